//go:build wasip1

package shardmill

import (
	"encoding/json"
	"fmt"
	"strings"
	"unsafe"
)

// The exports of the world in the canonical ABI: the memory layout of the types of
// wit/0.1.0/plugin.wit. Pointers have 4 bytes there; pointer fields of Go structs have 8, hence the
// type address.

const (
	inputWords = 10
	// none is the start of an absent span.
	none = ^uint32(0)
)

type address = uint32

// text is a string or a list in the canonical ABI: its start, and its number of bytes or elements.
type text struct {
	start address
	count uint32
}

type column struct {
	name, dataType text
	nullable       uint32
}

type route struct{ name, format, columns text }

type descriptor struct{ name, version, accepts, routes, extra text }

type configured struct {
	isError uint32
	descriptor
}

type configureError struct {
	isError uint32
	message text
}

type outcome struct {
	isError                 uint32
	arena, outputs, rejects text
}

type failure struct {
	isError, retryable, hasInput, input uint32
	message                             text
}

var (
	registered Configure
	plugin     Plugin

	// Outcome of the batch so far. The slices keep their capacity between calls.
	arena            []byte
	outputs, rejects []uint32
	records          []Record
	output           Output

	// Memory that the host reads until the post-return call. It must stay reachable for Go's collector.
	answer struct {
		configured
		configureError
		outcome
		failure
		message []byte
		held    []any
	}
)

// keep appends bytes to the outgoing arena and returns their offset.
func keep(bytes []byte) uint32 {
	start := uint32(len(arena))
	arena = append(arena, bytes...)
	return start
}

func newReader(text string) *strings.Reader { return strings.NewReader(text) }

func addressOf(pointer unsafe.Pointer) address { return address(uintptr(pointer)) }

func pointer(at address) unsafe.Pointer { return unsafe.Pointer(uintptr(at)) }

func bytesAt(at address, count uint32) []byte {
	if count == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(pointer(at)), count)
}

func stringAt(at address, count uint32) string { return string(bytesAt(at, count)) }

// list returns the address of a list and keeps the list reachable until the call is over.
func list[T any](of []T) text {
	if len(of) == 0 {
		return text{}
	}
	answer.held = append(answer.held, of)
	return text{addressOf(unsafe.Pointer(unsafe.SliceData(of))), uint32(len(of))}
}

func textOf(of string) text { return list([]byte(of)) }

//go:wasmexport cabi_realloc
func cabiRealloc(old, oldBytes, align, newBytes uint32) uint32 {
	if newBytes == 0 {
		return align
	}
	block := allocate(newBytes)
	if oldBytes > 0 {
		copy(unsafe.Slice((*byte)(block), newBytes), bytesAt(old, oldBytes))
	}
	return addressOf(block)
}

// chunk is where the host writes its arguments and answers. The next call reuses it, so calls leak
// nothing. A larger one replaces it when it is too small.
var (
	chunk     []uint64
	chunkUsed uint32
	// outgrown are the chunks of this call that became too small. The host may still use them.
	outgrown [][]uint64
)

func allocate(bytes uint32) unsafe.Pointer {
	words := (bytes + 7) / 8
	if uint32(len(chunk))-chunkUsed < words {
		outgrown = append(outgrown, chunk)
		chunk = make([]uint64, max(words, 2*uint32(len(chunk)), 8<<10))
		chunkUsed = 0
	}
	block := unsafe.Pointer(&chunk[chunkUsed])
	chunkUsed += words
	return block
}

func freeCall() {
	chunkUsed = 0
	clear(outgrown)
	outgrown = outgrown[:0]
	clear(answer.held)
	answer.held = answer.held[:0]
	answer.message = nil
}

//go:wasmexport shardmill:plugin/stage@0.1.0#configure
func exportConfigure(stream, streamBytes, shard, shardBytes, config, configBytes, upstream, upstreamCount, _, _ uint32) uint32 {
	context := &Context{
		StreamName: stringAt(stream, streamBytes),
		ShardID:    stringAt(shard, shardBytes),
		Config:     stringAt(config, configBytes),
		Upstream:   routesAt(upstream, upstreamCount),
	}
	described, err := configure(context)
	if err != nil {
		answer.configureError = configureError{isError: 1, message: textOf(err.Error())}
		return addressOf(unsafe.Pointer(&answer.configureError))
	}
	routes := make([]route, 0, len(described.Routes))
	for _, one := range described.Routes {
		columns := make([]column, 0, len(one.Columns))
		for _, of := range one.Columns {
			nullable := uint32(0)
			if of.Nullable {
				nullable = 1
			}
			columns = append(columns, column{textOf(of.Name), textOf(of.DataType), nullable})
		}
		routes = append(routes, route{textOf(one.Name), textOf(one.Format), list(columns)})
	}
	accepts := make([]text, 0, len(described.Accepts))
	for _, mediaType := range described.Accepts {
		accepts = append(accepts, textOf(mediaType))
	}
	answer.configured.descriptor = descriptor{
		name:    textOf(described.Name),
		version: textOf(described.Version),
		accepts: list(accepts),
		routes:  list(routes),
	}
	if len(described.Needs) > 0 {
		needs, _ := json.Marshal(described.Needs) // strings and booleans: cannot fail
		extra := [][2]text{{textOf("needs-columns"), textOf(string(needs))}}
		answer.configured.descriptor.extra = list(extra)
	}
	return addressOf(unsafe.Pointer(&answer.configured))
}

func configure(context *Context) (described Descriptor, err error) {
	defer func() {
		if panicked := recover(); panicked != nil {
			err = fmt.Errorf("panic: %v", panicked)
		}
	}()
	if registered == nil {
		return described, fmt.Errorf("no plugin is registered: call shardmill.Register in an init function")
	}
	described, plugin, err = registered(context)
	if err == nil && plugin == nil {
		err = fmt.Errorf("configure returned no plugin")
	}
	return described, err
}

func routesAt(at address, count uint32) []Route {
	if count == 0 {
		return nil
	}
	routes := make([]Route, 0, count)
	for _, one := range unsafe.Slice((*route)(pointer(at)), count) {
		read := Route{
			Name:   stringAt(one.name.start, one.name.count),
			Format: stringAt(one.format.start, one.format.count),
		}
		if one.columns.count > 0 {
			for _, of := range unsafe.Slice((*column)(pointer(one.columns.start)), one.columns.count) {
				read.Columns = append(read.Columns, Column{
					Name:     stringAt(of.name.start, of.name.count),
					DataType: stringAt(of.dataType.start, of.dataType.count),
					Nullable: of.nullable&0xff != 0,
				})
			}
		}
		routes = append(routes, read)
	}
	return routes
}

//go:wasmexport cabi_post_shardmill:plugin/stage@0.1.0#configure
func exportConfigureDone(uint32) { freeCall() }

//go:wasmexport shardmill:plugin/stage@0.1.0#process
func exportProcess(arenaAt, arenaBytes, wordsAt, wordCount uint32) uint32 {
	arena, outputs, rejects = arena[:0], outputs[:0], rejects[:0]
	read(bytesAt(arenaAt, arenaBytes), wordsAt, wordCount)
	if batch, wants := plugin.(BatchPlugin); wants {
		if err := runBatch(batch); err != nil {
			return failed(err, none)
		}
	}
	for index := range records {
		record := &records[index]
		arenaStart, outputsStart := len(arena), len(outputs)
		output.input = record.index
		err := run(record, &output)
		if err == nil {
			continue
		}
		if isRetryable(err) {
			return failed(err, record.index)
		}
		arena, outputs = arena[:arenaStart], outputs[:outputsStart]
		reason := strings.ToValidUTF8(err.Error(), "\uFFFD")
		rejects = append(rejects, record.index, keep([]byte(reason)), uint32(len(reason)))
	}
	answer.outcome = outcome{
		arena:   text{addressOf(unsafe.Pointer(unsafe.SliceData(arena))), uint32(len(arena))},
		outputs: text{addressOf(unsafe.Pointer(unsafe.SliceData(outputs))), uint32(len(outputs))},
		rejects: text{addressOf(unsafe.Pointer(unsafe.SliceData(rejects))), uint32(len(rejects))},
	}
	return addressOf(unsafe.Pointer(&answer.outcome))
}

// read decodes the words from the host into records.
func read(in []byte, wordsAt, wordCount uint32) {
	words := unsafe.Slice((*uint32)(pointer(wordsAt)), wordCount)
	count := int(wordCount / inputWords)
	records = records[:0]
	span := func(at []uint32) []byte { return in[at[0]:][:at[1]:at[1]] }
	for index := range count {
		of := words[index*inputWords:][:inputWords]
		records = append(records, Record{
			Key:         span(of[0:]),
			Payload:     span(of[2:]),
			Sequence:    span(of[4:]),
			SubSequence: of[6],
			Route:       of[7],
			ArrivedMs:   uint64(of[9])<<32 | uint64(of[8]),
			index:       uint32(index),
		})
	}
}

// run turns a panic into an error, so that only this record is rejected and not its neighbours.
func run(record *Record, output *Output) (err error) {
	defer func() {
		if panicked := recover(); panicked != nil {
			err = fmt.Errorf("panic: %v", panicked)
		}
	}()
	return plugin.Record(record, output)
}

func runBatch(batch BatchPlugin) (err error) {
	defer func() {
		if panicked := recover(); panicked != nil {
			err = fmt.Errorf("panic: %v", panicked)
		}
	}()
	return batch.Batch(records)
}

// failed returns the failure of the whole batch, at the record `input` or at none.
func failed(err error, input uint32) uint32 {
	answer.failure = failure{isError: 1, message: textOf(strings.ToValidUTF8(err.Error(), "\uFFFD"))}
	if isRetryable(err) {
		answer.failure.retryable = 1
	}
	if input != none {
		answer.failure.hasInput, answer.failure.input = 1, input
	}
	return addressOf(unsafe.Pointer(&answer.failure))
}

//go:wasmexport cabi_post_shardmill:plugin/stage@0.1.0#process
func exportProcessDone(uint32) { freeCall() }
