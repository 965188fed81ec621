// Calls the capabilities that the host itself answers: log, metrics, clock, random.
package main

import "shardmill"

const out = 0

var seen shardmill.Metric

func init() { shardmill.Register(configure) }
func main() {}

func configure(*shardmill.Context) (described shardmill.Descriptor, plugin shardmill.Plugin, err error) {
	described.Name, described.Version = "near", "0.1.0"
	described.Needs = []shardmill.Column{
		{Name: "make", DataType: "text"},
		{Name: "id", DataType: "bigint", Nullable: true},
	}
	described.Routes = []shardmill.Route{{Name: "out", Format: "application/json"}}
	seen, err = shardmill.NewCounter("seen", "Records seen")
	shardmill.Log(shardmill.Info, "configured")
	return described, shardmill.PluginFunc(record), err
}

func record(record *shardmill.Record, output *shardmill.Output) error {
	shardmill.Log(shardmill.Warn, "saw "+string(record.Payload))
	seen.Observe(1)
	now := shardmill.NowMs()
	return output.EmitJSON(out, struct {
		NowIsLater bool `json:"now_is_later"`
		Differ     bool `json:"differ"`
	}{
		now >= record.ArrivedMs && now > 1_700_000_000_000,
		shardmill.RandomU64() != shardmill.RandomU64(),
	})
}
