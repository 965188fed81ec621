//! Connections, hosts, origins and tokens of the ports.
