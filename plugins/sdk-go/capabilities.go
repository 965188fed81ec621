//go:build wasip1

package shardmill

import (
	"errors"
	"unsafe"
)

// Capabilities: functions of the host that a plugin may call if its stage grants them
// ([stage.grant]). They are the interfaces of wit/0.1.0/capabilities.wit. A component imports only the
// functions that it uses. The results of Lookup, NowMs, RandomU64 and Send may differ in a replay.

// Level is the severity of a log line.
type Level uint32

// The levels.
const (
	Trace Level = iota
	Debug
	Info
	Warn
	Error
)

// Log writes a line to the host's log.
func Log(level Level, line string) {
	logWrite(uint32(level), line)
}

//go:wasmimport shardmill:plugin/log@0.1.0 write
func logWrite(level uint32, line string)

// Metric is a time series that the plugin defines.
type Metric uint32

// NewCounter registers a metric that adds up its values. In configure only; the name must match
// [a-z][a-z0-9_]*.
func NewCounter(name, help string) (Metric, error) { return register(0, name, help) }

// NewGauge registers a metric that keeps its last value. In configure only.
func NewGauge(name, help string) (Metric, error) { return register(1, name, help) }

// NewHistogram registers a metric that counts the distribution of its values. In configure only.
func NewHistogram(name, help string) (Metric, error) { return register(2, name, help) }

// Observe records a value: a counter adds it, a gauge keeps it, a histogram counts it.
func (m Metric) Observe(value float64) { metricsObserve(uint32(m), value) }

func register(kind uint32, name, help string) (Metric, error) {
	var answer struct {
		isError       uint32
		number, count uint32 // with an error: the start and size of its text
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

// Lookup reads the rows of all keys from a reference table in one request; see [BatchPlugin]. A row is
// a JSON object, or nil if the table has no such key. It is valid until the call ends.
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
		// The failure has the same place in the union: whether it is retryable, then its text.
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

// NowMs returns the time of day, in milliseconds since the Unix epoch.
func NowMs() uint64 { return clockNowMs() }

//go:wasmimport shardmill:plugin/clock@0.1.0 now-ms
func clockNowMs() uint64

// RandomU64 returns 64 random bits.
func RandomU64() uint64 { return randomNextU64() }

//go:wasmimport shardmill:plugin/random@0.1.0 next-u64
func randomNextU64() uint64

// Header is the name and the value of an HTTP header.
type Header struct{ Name, Value string }

// Request is an HTTP request to a granted host.
type Request struct {
	// Method is an HTTP method, such as GET.
	Method, URL string
	Headers     []Header
	// Body is absent if it is empty.
	Body []byte
}

// Response is the answer to a Request, whatever its status.
type Response struct {
	Status int
	// Headers have lower-case names.
	Headers []Header
	// Body is valid until the call ends.
	Body []byte
}

// Send sends a request and waits for the response. A status such as 500 is not an error.
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

// hostFailure returns an error that retries the batch if the host calls the failure retryable, and
// rejects the record otherwise.
func hostFailure(retryable uint32, message text) error {
	err := errors.New(stringAt(message.start, message.count))
	if retryable&0xff != 0 {
		return Retry(err)
	}
	return err
}
