//! Commands, the intake, files and guests as strangers use them.
