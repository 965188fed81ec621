// gob-cars: decodes what encoding/gob wrote, with encoding/gob, and gives JSON.
//
// Accepts application/x-gob: each record is a gob stream of its own that holds one car or more. Gives
// one JSON object per car on the route "cars".
package main

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"time"

	"local/gob-cars/car"
	"shardmill"
)

// The routes, in the order in which they are declared.
const cars = 0

// row is a car as tables have it.
type row struct {
	Make     string            `json:"make"`
	Model    string            `json:"model"`
	Year     int               `json:"year"`
	Price    float64           `json:"price"`
	Electric bool              `json:"electric"`
	Colours  []string          `json:"colours"`
	Options  map[string]string `json:"options"`
	Sold     *time.Time        `json:"sold"`
}

func init() { shardmill.Register(configure) }

// main is not called: the host calls what init has registered.
func main() {}

func configure(*shardmill.Context) (shardmill.Descriptor, shardmill.Plugin, error) {
	return shardmill.Descriptor{
		Name:    "gob-cars",
		Version: "0.1.0",
		Accepts: []string{"application/x-gob"},
		Routes: []shardmill.Route{{
			Name:   "cars",
			Format: "application/json",
			Columns: []shardmill.Column{
				{Name: "make", DataType: "text"},
				{Name: "model", DataType: "text"},
				{Name: "year", DataType: "bigint"},
				{Name: "price", DataType: "double precision"},
				{Name: "electric", DataType: "boolean"},
				{Name: "colours", DataType: "jsonb", Nullable: true},
				{Name: "options", DataType: "jsonb", Nullable: true},
				{Name: "sold", DataType: "timestamptz", Nullable: true},
			},
		}},
	}, shardmill.PluginFunc(decode), nil
}

func decode(record *shardmill.Record, output *shardmill.Output) error {
	if len(record.Payload) == 0 {
		return errors.New("empty payload where a gob of a car was due")
	}
	decoder := gob.NewDecoder(bytes.NewReader(record.Payload))
	for {
		var one car.Car // afresh: gob leaves alone what is zero
		switch err := decoder.Decode(&one); {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("no gob of a car: %w", err)
		}
		if err := output.EmitJSON(cars, toRow(&one)); err != nil {
			return err
		}
	}
}

func toRow(of *car.Car) row {
	made := row{of.Make, of.Model, of.Year, of.Price, of.Electric, of.Colours, of.Options, nil}
	if !of.Sold.IsZero() {
		made.Sold = &of.Sold
	}
	return made
}
