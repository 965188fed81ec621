// {{name}}: greets. Accepts {"name":"Ada"}, emits {"greeting":"Hello, Ada!"} on the route "out".
package main

import (
	"encoding/json"
	"errors"

	"shardmill"
)

// Routes, in the order of their declaration.
const out = 0

type person struct {
	Name string `json:"name"`
}

type greeting struct {
	Greeting string `json:"greeting"`
}

func init() { shardmill.Register(configure) }

// main is never called: the host calls the functions that init registers.
func main() {}

// configure can read the TOML table [stage.config] with context.ReadConfig.
func configure(context *shardmill.Context) (shardmill.Descriptor, shardmill.Plugin, error) {
	return shardmill.Descriptor{
		Name:    "{{name}}",
		Version: "0.1.0",
		Accepts: []string{"application/json"},
		Routes: []shardmill.Route{{
			Name:    "out",
			Format:  "application/json",
			Columns: []shardmill.Column{{Name: "greeting", DataType: "text"}},
		}},
	}, shardmill.PluginFunc(greet), nil
}

// greet may return an error: the record then becomes a dead letter. Other records are not affected.
func greet(record *shardmill.Record, output *shardmill.Output) error {
	var of person
	if err := json.Unmarshal(record.Payload, &of); err != nil {
		return err
	}
	if of.Name == "" {
		return errors.New("expected an object with a text `name`")
	}
	text := "Hello, " + of.Name + "!" // edit me
	return output.EmitJSON(out, greeting{text})
}
