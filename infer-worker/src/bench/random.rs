//! The draws of Python's `random`, so that workloads are the baseline's to the last token.

/// Python's `random.Random`: MT19937, seeded by an integer.
pub(super) struct Python {
    state: [u32; 624],
    next: usize,
}

impl Python {
    /// `random.Random(seed)`, for seeds below 2^32: `init_by_array` of one word.
    pub fn new(seed: u32) -> Self {
        let mut state = [0_u32; 624];
        state[0] = 19_650_218;
        for i in 1..624 {
            let last = state[i - 1];
            state[i] = 1_812_433_253_u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
        let mut i = 1;
        let mut mix = |round: bool, state: &mut [u32; 624]| {
            let last = state[i - 1];
            let mixed = last ^ (last >> 30);
            state[i] = if round {
                (state[i] ^ mixed.wrapping_mul(1_664_525)).wrapping_add(seed)
            } else {
                (state[i] ^ mixed.wrapping_mul(1_566_083_941)).wrapping_sub(i as u32)
            };
            i += 1;
            if i == 624 {
                state[0] = state[623];
                i = 1;
            }
        };
        for _ in 0..624 {
            mix(true, &mut state);
        }
        for _ in 0..623 {
            mix(false, &mut state);
        }
        state[0] = 0x8000_0000;
        Self { state, next: 624 }
    }

    fn word(&mut self) -> u32 {
        if self.next == 624 {
            for i in 0..624 {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `randint(low, high)`: as many bits as the range has, until they are below it.
    pub fn randint(&mut self, low: u32, high: u32) -> u32 {
        let range = high - low + 1;
        let bits = u32::BITS - range.leading_zeros();
        loop {
            let drawn = self.word() >> (u32::BITS - bits);
            if drawn < range {
                return low + drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `r = random.Random(0); [r.randint(0, 10000) for _ in range(6)]`, and the same for seed 101 and 100–1024.
    #[test]
    fn draws_are_python_s() {
        let draws = |seed, low, high| {
            let mut python = Python::new(seed);
            [(); 6].map(|()| python.randint(low, high))
        };
        assert_eq!(draws(0, 0, 10_000), [6311, 6890, 663, 4242, 8376, 7961]);
        assert_eq!(draws(101, 100, 1024), [695, 967, 299, 652, 467, 578]);
    }
}
