module shardmill

go 1.24
