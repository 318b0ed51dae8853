//! Reproducible random draws. A draw depends only on the seed and its purpose, not on earlier draws: two settings that start
//! a replica at the same time get the same start-up time (common random numbers).

/// SplitMix64. Not from a crate: tests compare its output with files, so an update must not change it.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

/// Draws from measured values with replacement.
#[derive(Clone, Debug)]
pub struct SeededDraws<'a> {
    seed: u64,
    samples: &'a [u64],
}

// === impl SplitMix64 ===

impl SplitMix64 {
    /// Creates a generator.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `bound`. Panics if `bound` is zero. The modulo bias is below 2⁻³² for the bounds used here.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Returns `true` with a probability of `per_million`.
    pub const fn chance(&mut self, per_million: u64) -> bool {
        self.below(1_000_000) < per_million
    }
}

// === impl SeededDraws ===

impl<'a> SeededDraws<'a> {
    /// Draws from `samples`, which must not be empty.
    pub const fn new(seed: u64, samples: &'a [u64]) -> Self {
        Self { seed, samples }
    }

    /// Returns the draw for `nth` of `purpose`.
    pub fn draw(&self, purpose: u64, nth: u64) -> u64 {
        let mut rng = SplitMix64::new(self.seed);
        let mut rng = SplitMix64::new(rng.next() ^ purpose);
        let mut rng = SplitMix64::new(rng.next() ^ nth);
        let index = rng.below(self.samples.len() as u64);
        self.samples[usize::try_from(index).unwrap_or_default()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_matches_the_reference() {
        // First outputs of the reference implementation for seed 1234567.
        let mut rng = SplitMix64::new(1_234_567);
        let first = [rng.next(), rng.next(), rng.next()];
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn draw_depends_only_on_seed_and_purpose() {
        let samples: Vec<u64> = (0..100).collect();
        let (one, other) = (SeededDraws::new(1, &samples), SeededDraws::new(2, &samples));
        assert_eq!(one.draw(7, 0), one.draw(7, 0));
        let draws =
            |draws: &SeededDraws<'_>| (0..1000).map(|purpose| draws.draw(purpose, 0)).collect::<Vec<_>>();
        assert_ne!(draws(&one), draws(&other));
        assert_ne!((0..50).map(|nth| one.draw(7, nth)).collect::<Vec<_>>(), vec![one.draw(7, 0); 50]);
        // Expected count of each: 10, standard deviation √(1000 × 0.01 × 0.99) = 3.1.
        let drawn = draws(&one);
        let counts = samples.iter().map(|sample| drawn.iter().filter(|drawn| *drawn == sample).count());
        assert!(
            counts.clone().max() <= Some(26) && counts.sum::<usize>() == 1000,
            "five standard deviations"
        );
    }
}
