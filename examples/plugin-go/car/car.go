// Package car has the types that the producer and the plugin share.
package car

import "time"

// Car is the struct that the web application puts on the stream, encoded as gob.
type Car struct {
	Make, Model string
	Year        int
	Price       float64
	Electric    bool
	Colours     []string
	Options     map[string]string
	Sold        time.Time
}
