//! Chance that can be repeated: what a draw gives depends on the seed and on what it is for, never on how many draws
//! came before. So two settings that start a replica at the same moment are given the same start-up, and what differs
//! between them is the setting.

/// SplitMix64. Our own, since files and documents are compared with what it gives: no update of a crate may change it.
#[derive(Clone, Debug)]
pub struct Rng(u64);

/// Draws with replacement from what was measured (a bootstrap).
#[derive(Clone, Debug)]
pub struct Draws<'a> {
    seed: u64,
    samples: &'a [u64],
}

// === impl Rng ===

impl Rng {
    /// The sequence of this seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not zero. Off by less than 2⁻³² for the bounds that there are here.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Whether one in a million parts happened that has `parts` of them.
    pub const fn chance(&mut self, parts: u64) -> bool {
        self.below(1_000_000) < parts
    }
}

// === impl Draws ===

impl<'a> Draws<'a> {
    /// From `samples`, which are not empty.
    pub const fn new(seed: u64, samples: &'a [u64]) -> Self {
        Self { seed, samples }
    }

    /// What is drawn for this.
    pub fn of(&self, purpose: u64, nth: u64) -> u64 {
        let mut rng = Rng::new(self.seed);
        let mut rng = Rng::new(rng.next() ^ purpose);
        let mut rng = Rng::new(rng.next() ^ nth);
        let index = rng.below(self.samples.len() as u64);
        self.samples[usize::try_from(index).unwrap_or_default()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_that_of_the_reference() {
        // The first outputs of SplitMix64 for seed 1234567, as in its author's reference implementation.
        let mut rng = Rng::new(1_234_567);
        let first = [rng.next(), rng.next(), rng.next()];
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn a_draw_depends_on_the_seed_and_on_its_purpose_alone() {
        let samples: Vec<u64> = (0..100).collect();
        let (one, other) = (Draws::new(1, &samples), Draws::new(2, &samples));
        assert_eq!(one.of(7, 0), one.of(7, 0));
        let draws = |draws: &Draws<'_>| (0..1000).map(|purpose| draws.of(purpose, 0)).collect::<Vec<_>>();
        assert_ne!(draws(&one), draws(&other));
        assert_ne!((0..50).map(|nth| one.of(7, nth)).collect::<Vec<_>>(), vec![one.of(7, 0); 50]);
        // Each of the 100 is expected 10 times, with a standard deviation of √(1000 × 0.01 × 0.99) = 3.1.
        let drawn = draws(&one);
        let counts = samples.iter().map(|sample| drawn.iter().filter(|drawn| *drawn == sample).count());
        assert!(counts.clone().max() <= Some(26) && counts.sum::<usize>() == 1000, "five deviations above");
    }
}
