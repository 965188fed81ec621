// Calls the capabilities that ask other servers: lookup, http.
package main

import (
	"shardmill"
	"strings"
)

const out = 0

// far keeps the rows of a batch for its records.
type far struct {
	URL  string `json:"url"`
	rows map[string][]byte
}

func init() { shardmill.Register(configure) }
func main() {}

func configure(context *shardmill.Context) (described shardmill.Descriptor, plugin shardmill.Plugin, err error) {
	described.Name, described.Version = "far", "0.1.0"
	described.Routes = []shardmill.Route{{Name: "out", Format: "application/json"}}
	f := new(far)
	return described, f, context.ReadConfig(f)
}

func (f *far) Batch(records []shardmill.Record) error {
	keys := make([]string, len(records))
	for index := range records {
		keys[index] = string(records[index].Payload)
	}
	rows, err := shardmill.Lookup("cars", keys)
	f.rows = make(map[string][]byte, len(rows))
	for index, row := range rows {
		f.rows[keys[index]] = row
	}
	return err
}

func (f *far) Record(record *shardmill.Record, output *shardmill.Output) error {
	if row := f.rows[string(record.Payload)]; row != nil {
		output.Emit(out, row)
		return nil
	}
	url := string(record.Payload)
	if !strings.HasPrefix(url, "http") {
		url = f.URL + url
	}
	response, err := shardmill.Send(&shardmill.Request{
		Method:  "POST",
		URL:     url,
		Headers: []shardmill.Header{{Name: "x-key", Value: string(record.Key)}},
		Body:    record.Payload,
	})
	if err == nil {
		output.Emit(out, response.Body)
	}
	return err
}
