"""The wire of Lattica, without I/O: codecs and state machines. The contract stands in protocols/README.md."""
