//! Files, compilers and connections beside other users of the machine.
