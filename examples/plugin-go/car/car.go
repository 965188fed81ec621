// Package car is what the producer and the plugin agree on.
package car

import "time"

// Car is what the web application puts on the stream, as gob writes it.
type Car struct {
	Make, Model string
	Year        int
	Price       float64
	Electric    bool
	Colours     []string
	Options     map[string]string
	Sold        time.Time
}
