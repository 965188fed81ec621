//! Reads an input as a list of choices. Every input is valid, so mutations reach deep code.

/// Unread choices of an input. After its end, each choice is the first option.
pub struct Choices<'d> {
    rest: &'d [u8],
}

impl<'d> Choices<'d> {
    /// Starts at the beginning of an input.
    pub fn new(data: &'d [u8]) -> Self {
        Self { rest: data }
    }

    /// Takes a byte.
    pub fn byte(&mut self) -> u8 {
        match self.rest.split_first() {
            Some((first, rest)) => {
                self.rest = rest;
                *first
            }
            None => 0,
        }
    }

    /// Takes a number below a limit of at most 256.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::from(self.byte()) % limit.max(1)
    }

    /// Takes a number of 32 bits.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Takes bytes; fewer if the input ends.
    pub fn bytes(&mut self, length: usize) -> &'d [u8] {
        let (taken, rest) = self.rest.split_at(length.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// Takes the rest.
    pub fn rest(&mut self) -> &'d [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Takes one of the options.
    pub fn one_of<'o, T>(&mut self, options: &'o [T]) -> &'o T {
        &options[self.below(options.len())]
    }
}
