// Package shardmill is what shardmill plugins in Go are written with: no generated code, no offsets.
//
// A plugin is a package main that hands a configure function to [Register] in its init:
//
//	package main
//
//	import (
//		"bytes"
//
//		"shardmill"
//	)
//
//	const out = 0 // routes, in the order in which they are declared
//
//	func init() { shardmill.Register(configure) }
//	func main() {}
//
//	func configure(*shardmill.Context) (shardmill.Descriptor, shardmill.Plugin, error) {
//		return shardmill.Descriptor{
//			Name:    "upper",
//			Version: "0.1.0",
//			Routes:  []shardmill.Route{{Name: "out", Format: "text/plain"}},
//		}, shardmill.PluginFunc(record), nil
//	}
//
//	func record(record *shardmill.Record, output *shardmill.Output) error {
//		output.Emit(out, bytes.ToUpper(record.Payload))
//		return nil
//	}
//
// What becomes of a record:
//
//	emitted or passed, once or more often    delivered on the routes named
//	nothing, and no error                    filtered: dropped on purpose, and counted
//	an error, or a panic                     dead-lettered alone, with the reason
//	an error of [Retry]                      tried again with its batch, after a pause
//
// The bytes of a record are valid until the call ends: copy what must live longer. An instance's
// memory is a cache: it is lost when the plugin fails. What becomes of a record must depend on the
// record and the configuration alone, for it may be replayed: use [Record.Arrived] for the time. In
// the sandbox, [time.Now] is a counter that begins in 1970, random numbers have a fixed seed, there
// are no files and no network, and what is printed is dropped.
package shardmill

import (
	"encoding/json"
	"errors"
	"time"
)

// Plugin takes one record at a time.
type Plugin interface {
	// Record emits any number of outputs, or none to filter the record. An error rejects it; what
	// was emitted for it is taken back.
	Record(record *Record, output *Output) error
}

// PluginFunc is a function that is a [Plugin].
type PluginFunc func(record *Record, output *Output) error

// Record calls the function.
func (f PluginFunc) Record(record *Record, output *Output) error { return f(record, output) }

// BatchPlugin is a [Plugin] that sees a batch before its records, to ask the host for what they need
// only once. Batches are cut by size and time and differ in a replay.
type BatchPlugin interface {
	Plugin
	// Batch is called before the records of a batch. An error fails the whole batch.
	Batch(records []Record) error
}

// Configure makes the plugin. Called once, before the first record; an error refuses the
// configuration, and the pipeline does not start.
type Configure func(context *Context) (Descriptor, Plugin, error)

// Register says what the plugin is. Due once, in an init function.
func Register(configure Configure) { registered = configure }

// Context is where and how the plugin is used.
type Context struct {
	StreamName string
	ShardID    string
	// Config is the TOML table [stage.config] as a JSON object; see ReadConfig.
	Config   string
	Upstream []Route
}

// ReadConfig reads the configuration into a struct. A key that it has no field for is an error.
func (c *Context) ReadConfig(into any) error {
	decoder := json.NewDecoder(newReader(c.Config))
	decoder.DisallowUnknownFields()
	return decoder.Decode(into)
}

// Descriptor is what a plugin is and what it takes and gives.
type Descriptor struct {
	// Name and Version are for error texts and metrics. Not empty.
	Name, Version string
	// Accepts are the media types that it takes. Empty: any.
	Accepts []string
	// Needs are the columns that the rows which come in must have: checked before a record flows.
	Needs []Column
	// Routes are the ways out; the first one has the number 0.
	Routes []Route
}

// Route is a named way out of a stage.
type Route struct {
	// Name is a-z, 0-9, - and _.
	Name string
	// Format is the media type of the payloads.
	Format string
	// Columns are those of the rows, where they are known.
	Columns []Column
}

// Column is a column of a route's rows.
type Column struct {
	Name string `json:"name"`
	// DataType is a PostgreSQL type name, such as bigint.
	DataType string `json:"data_type"`
	// Nullable: the value may be null or absent.
	Nullable bool `json:"nullable"`
}

// Record is one record on its way in. Its bytes are valid until the call ends.
type Record struct {
	Payload []byte
	// Key is the partition key.
	Key []byte
	// Sequence is the sequence number: up to 129 digits, so it fits no integer.
	Sequence []byte
	// SubSequence is the position within an aggregated record, from 0.
	SubSequence uint32
	// Route is an index into Context.Upstream.
	Route uint32
	// ArrivedMs is when the stream took it, in milliseconds since the Unix epoch.
	ArrivedMs uint64

	index uint32
}

// Arrived is when the stream took the record: the time to use for "now". A replay sees the same.
func (r *Record) Arrived() time.Time { return time.UnixMilli(int64(r.ArrivedMs)).UTC() }

// Output takes what becomes of a record.
type Output struct {
	input uint32
}

// Emit delivers a payload on a route, under the key that came in. The payload is copied.
func (o *Output) Emit(route uint32, payload []byte) {
	start := keep(payload)
	outputs = append(outputs, o.input, route, none, 0, start, uint32(len(payload)))
}

// EmitKeyed delivers a payload on a route, under a key of its own.
func (o *Output) EmitKeyed(route uint32, key string, payload []byte) {
	keyStart := keep([]byte(key))
	start := keep(payload)
	outputs = append(outputs, o.input, route, keyStart, uint32(len(key)), start, uint32(len(payload)))
}

// EmitJSON delivers a value as JSON on a route.
func (o *Output) EmitJSON(route uint32, value any) error {
	payload, err := json.Marshal(value)
	if err != nil {
		return err
	}
	o.Emit(route, payload)
	return nil
}

// Pass delivers the record as it came in, without a copy.
func (o *Output) Pass(route uint32) {
	outputs = append(outputs, o.input, route, none, 0, none, 0)
}

// Retry makes an error that has the batch tried again after a pause, instead of rejecting a record.
func Retry(cause error) error { return retryable{cause} }

type retryable struct{ error }

func (r retryable) Unwrap() error { return r.error }

// isRetryable tells what Retry has made, and a host's failure that may pass.
func isRetryable(err error) bool {
	var retry retryable
	return errors.As(err, &retry)
}
