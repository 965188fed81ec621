//go:build wasip1

package shardmill

import (
	"errors"
	"unsafe"
)

// What a plugin may ask of the host, if its stage grants it ([stage.grant]): the interfaces of
// wit/0.1.0/capabilities.wit. A function that is not used is not imported. What Lookup, NowMs,
// RandomU64 and Send answer may differ at a replay.

// Level is how important a line in the log is.
type Level uint32

// The levels.
const (
	Trace Level = iota
	Debug
	Info
	Warn
	Error
)

// Log writes a line in the host's log.
func Log(level Level, line string) {
	logWrite(uint32(level), line)
}

//go:wasmimport shardmill:plugin/log@0.1.0 write
func logWrite(level uint32, line string)

// Metric is a series of the plugin's own.
type Metric uint32

// NewCounter announces a metric that adds up. In configure only; the name is [a-z][a-z0-9_]*.
func NewCounter(name, help string) (Metric, error) { return register(0, name, help) }

// NewGauge announces a metric that keeps its last value. In configure only.
func NewGauge(name, help string) (Metric, error) { return register(1, name, help) }

// NewHistogram announces a metric that counts how values are distributed. In configure only.
func NewHistogram(name, help string) (Metric, error) { return register(2, name, help) }

// Observe gives the metric a value.
func (m Metric) Observe(value float64) { metricsObserve(uint32(m), value) }

func register(kind uint32, name, help string) (Metric, error) {
	var answer struct {
		isError       uint32
		number, count uint32 // or the error's text
	}
	metricsRegister(kind, name, help, unsafe.Pointer(&answer))
	if answer.isError&0xff != 0 {
		return 0, errors.New(stringAt(answer.number, answer.count))
	}
	return Metric(answer.number), nil
}

//go:wasmimport shardmill:plugin/metrics@0.1.0 register
func metricsRegister(kind uint32, name, help string, answer unsafe.Pointer)

//go:wasmimport shardmill:plugin/metrics@0.1.0 observe
func metricsObserve(metric uint32, value float64)

// Lookup asks the table for the rows of all keys at once; see [BatchPlugin]. A row is a JSON object,
// nil where there is none, and valid until the call ends.
func Lookup(table string, keys []string) ([][]byte, error) {
	var joined []byte
	spans := make([]uint32, 0, 2*len(keys))
	for _, key := range keys {
		spans = append(spans, uint32(len(joined)), uint32(len(key)))
		joined = append(joined, key...)
	}
	var answer struct {
		isError     uint32
		arena, rows text
	}
	lookupGet(table, unsafe.Pointer(unsafe.SliceData(joined)), uint32(len(joined)),
		unsafe.Pointer(unsafe.SliceData(spans)), uint32(len(spans)), unsafe.Pointer(&answer))
	if answer.isError&0xff != 0 {
		// The failure lies in the same place: whether it may pass, then its text.
		return nil, hostFailure(answer.arena.start, text{answer.arena.count, answer.rows.start})
	}
	found := bytesAt(answer.arena.start, answer.arena.count)
	words := unsafe.Slice((*uint32)(pointer(answer.rows.start)), answer.rows.count)
	rows := make([][]byte, len(keys))
	for index := range rows {
		if start, count := words[2*index], words[2*index+1]; start != none {
			rows[index] = found[start:][:count:count]
		}
	}
	return rows, nil
}

//go:wasmimport shardmill:plugin/lookup@0.1.0 get
func lookupGet(table string, arena unsafe.Pointer, arenaBytes uint32, keys unsafe.Pointer, keyWords uint32, answer unsafe.Pointer)

// NowMs is the time of day, in milliseconds since the Unix epoch.
func NowMs() uint64 { return clockNowMs() }

//go:wasmimport shardmill:plugin/clock@0.1.0 now-ms
func clockNowMs() uint64

// RandomU64 gives 64 random bits.
func RandomU64() uint64 { return randomNextU64() }

//go:wasmimport shardmill:plugin/random@0.1.0 next-u64
func randomNextU64() uint64

// Header is a name and a value.
type Header struct{ Name, Value string }

// Request is what a host that is granted is asked.
type Request struct {
	// Method is such as GET.
	Method, URL string
	Headers     []Header
	// Body is none where it is empty.
	Body []byte
}

// Response is what was answered.
type Response struct {
	Status int
	// Headers have names in lower case.
	Headers []Header
	// Body is valid until the call ends.
	Body []byte
}

// Send sends a request and waits for the answer, whatever its status.
func Send(request *Request) (*Response, error) {
	type header struct{ name, value text }
	headers := make([]header, 0, len(request.Headers))
	for _, one := range request.Headers {
		headers = append(headers, header{textOf(one.Name), textOf(one.Value)})
	}
	var answer struct {
		isError, status uint32
		headers, body   text
	}
	httpSend(request.Method, request.URL,
		unsafe.Pointer(unsafe.SliceData(headers)), uint32(len(headers)),
		unsafe.Pointer(unsafe.SliceData(request.Body)), uint32(len(request.Body)),
		unsafe.Pointer(&answer))
	if answer.isError&0xff != 0 {
		return nil, hostFailure(answer.status, answer.headers)
	}
	response := &Response{
		Status: int(answer.status & 0xffff),
		Body:   bytesAt(answer.body.start, answer.body.count),
	}
	if answer.headers.count > 0 {
		for _, one := range unsafe.Slice((*header)(pointer(answer.headers.start)), answer.headers.count) {
			response.Headers = append(response.Headers, Header{
				Name:  stringAt(one.name.start, one.name.count),
				Value: stringAt(one.value.start, one.value.count),
			})
		}
	}
	return response, nil
}

//go:wasmimport shardmill:plugin/http@0.1.0 send
func httpSend(method, url string, headers unsafe.Pointer, headerCount uint32, body unsafe.Pointer, bodyBytes uint32, answer unsafe.Pointer)

// hostFailure is an error that retries the batch, or rejects the record, as the host says.
func hostFailure(retryable uint32, message text) error {
	err := errors.New(stringAt(message.start, message.count))
	if retryable&0xff != 0 {
		return Retry(err)
	}
	return err
}
