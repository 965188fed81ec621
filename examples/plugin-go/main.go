// gob-cars: decodes records written by encoding/gob, with encoding/gob, and emits JSON.
//
// Accepts application/x-gob: each record is a complete gob stream with one or more cars. Emits one JSON
// object per car on the route "cars".
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

// Routes, in the order of their declaration.
const cars = 0

// row is a car as a row of a table.
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

// main is never called: the host calls the functions that init registers.
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
		return errors.New("empty payload: expected a gob of a car")
	}
	decoder := gob.NewDecoder(bytes.NewReader(record.Payload))
	for {
		var one car.Car // a new one each time: gob does not set fields that are zero
		switch err := decoder.Decode(&one); {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("invalid gob of a car: %w", err)
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
