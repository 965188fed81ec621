// {{name}}: greets. Takes {"name":"Ada"}, gives {"greeting":"Hello, Ada!"} on the route "out".
package main

import (
	"encoding/json"
	"errors"

	"shardmill"
)

// The routes, in the order in which they are declared.
const out = 0

type person struct {
	Name string `json:"name"`
}

type greeting struct {
	Greeting string `json:"greeting"`
}

func init() { shardmill.Register(configure) }

// main is not called: the host calls what init has registered.
func main() {}

// configure may read the TOML table [stage.config] by context.ReadConfig.
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

// greet rejects a record by an error: it is kept with the reason, and its neighbours go on.
func greet(record *shardmill.Record, output *shardmill.Output) error {
	var of person
	if err := json.Unmarshal(record.Payload, &of); err != nil {
		return err
	}
	if of.Name == "" {
		return errors.New("an object with a text `name` was due")
	}
	text := "Hello, " + of.Name + "!" // edit me
	return output.EmitJSON(out, greeting{text})
}
