// Package shardmill is the SDK for shardmill plugins in Go. It needs no generated code and no offsets.
//
// A plugin is a package main whose init passes a configure function to [Register]:
//
//	package main
//
//	import (
//		"bytes"
//
//		"shardmill"
//	)
//
//	const out = 0 // routes, in the order of their declaration
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
// Outcome of a record:
//
//	emitted or passed, once or more often    delivered on the routes named
//	nothing, and no error                    filtered: dropped on purpose
//	an error, or a panic                     dead-lettered alone, with the reason
//	an error of [Retry]                      retried with its batch, after a backoff
//
// The bytes of a record are valid until the call ends: copy what must live longer. Treat an
// instance's memory as a cache: it is lost when the plugin fails. The outcome of a record must depend
// only on the record and the configuration, because the record may be replayed: use [Record.Arrived]
// for the time. In the sandbox, [time.Now] is a counter that begins in 1970, random numbers have a
// fixed seed, there are no files and no network, and printed text is dropped.
package shardmill

import (
	"encoding/json"
	"errors"
	"time"
)

// Plugin processes one record at a time.
type Plugin interface {
	// Record emits any number of outputs, or none to filter the record. An error rejects the record
	// and discards its outputs.
	Record(record *Record, output *Output) error
}

// PluginFunc is a function that is a [Plugin].
type PluginFunc func(record *Record, output *Output) error

// Record calls the function.
func (f PluginFunc) Record(record *Record, output *Output) error { return f(record, output) }

// BatchPlugin is a [Plugin] that sees a batch before its records, so that it can make one request to
// the host for all of them. Batches are cut by size and time, so a replay has different ones.
type BatchPlugin interface {
	Plugin
	// Batch is called before the records of a batch. An error fails the whole batch.
	Batch(records []Record) error
}

// Configure creates the plugin. It is called once, before the first record. If it returns an error,
// the configuration is refused and the pipeline does not start.
type Configure func(context *Context) (Descriptor, Plugin, error)

// Register registers the plugin. Call it exactly once, in an init function.
func Register(configure Configure) { registered = configure }

// Context describes the stage that the plugin runs in.
type Context struct {
	StreamName string
	ShardID    string
	// Config is the TOML table [stage.config] as a JSON object; see ReadConfig.
	Config   string
	Upstream []Route
}

// ReadConfig reads the configuration into a struct. A key without a field in the struct is an error.
func (c *Context) ReadConfig(into any) error {
	decoder := json.NewDecoder(newReader(c.Config))
	decoder.DisallowUnknownFields()
	return decoder.Decode(into)
}

// Descriptor describes a plugin, its inputs and its outputs.
type Descriptor struct {
	// Name and Version appear in error texts and metrics. They must not be empty.
	Name, Version string
	// Accepts are the accepted media types. If empty, all are accepted.
	Accepts []string
	// Needs are the columns that the incoming rows must have. They are checked at the start.
	Needs []Column
	// Routes are the outputs of the stage; the first one has the number 0.
	Routes []Route
}

// Route is a named output of a stage.
type Route struct {
	// Name consists of a-z, 0-9, - and _.
	Name string
	// Format is the media type of the payloads.
	Format string
	// Columns are the columns of the rows, if they are known.
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

// Record is an incoming record. Its bytes are valid until the call ends.
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
	// ArrivedMs is the arrival time in the stream, in milliseconds since the Unix epoch.
	ArrivedMs uint64

	index uint32
}

// Arrived returns the arrival time of the record in the stream. Use it for "now": it is the same in
// a replay.
func (r *Record) Arrived() time.Time { return time.UnixMilli(int64(r.ArrivedMs)).UTC() }

// Output collects the outputs of a record.
type Output struct {
	input uint32
}

// Emit delivers a payload on a route, under the key of the record. The payload is copied.
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

// Pass delivers the unchanged record, without a copy.
func (o *Output) Pass(route uint32) {
	outputs = append(outputs, o.input, route, none, 0, none, 0)
}

// Retry wraps an error so that the whole batch is retried after a backoff and no record is rejected.
func Retry(cause error) error { return retryable{cause} }

type retryable struct{ error }

func (r retryable) Unwrap() error { return r.error }

// isRetryable recognises errors made by Retry, and failures of the host that may pass.
func isRetryable(err error) bool {
	var retry retryable
	return errors.As(err, &retry)
}
