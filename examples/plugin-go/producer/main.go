// producer writes cars as a web application would put them on a stream: each record is a complete gob
// stream. On standard output, each record is preceded by its length (4 bytes, big-endian), as
// `shardmill stream put --format binary` expects.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"log"
	"os"
	"time"

	"local/gob-cars/car"
)

var cars = []car.Car{
	{
		Make: "Honda", Model: "Civic", Year: 2014, Price: 18190.5,
		Colours: []string{"blue", "silver"},
		Options: map[string]string{"gearbox": "manual"},
		Sold:    time.Date(2014, time.March, 9, 16, 30, 0, 0, time.UTC),
	},
	{
		Make: "Tesla", Model: "Model S", Year: 2013, Price: 69900, Electric: true,
		Sold: time.Date(2014, time.January, 31, 23, 59, 59, 123456789, time.FixedZone("", -8*3600)),
	},
	{Make: "Škoda", Model: "Octavia \"Combi\"", Year: 1996},
	{},
	{Make: "Toyota", Model: "Corolla", Year: -1, Price: 1e-9, Colours: []string{""}},
}

func main() {
	for _, one := range cars {
		put(encode(&one))
	}
	put(encode(&cars[0])[:40]) // a truncated record
}

func encode(one *car.Car) []byte {
	var record bytes.Buffer
	if err := gob.NewEncoder(&record).Encode(one); err != nil {
		log.Fatal(err)
	}
	return record.Bytes()
}

func put(record []byte) {
	length := binary.BigEndian.AppendUint32(nil, uint32(len(record)))
	if _, err := os.Stdout.Write(append(length, record...)); err != nil {
		log.Fatal(err)
	}
}
