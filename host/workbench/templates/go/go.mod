module local/{{name}}

go 1.24

require shardmill v0.0.0

replace shardmill => ./sdk
