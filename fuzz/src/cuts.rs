//! Splits inputs into parts, as a network delivers them.

/// Splits the input into single bytes, and into parts of pseudo-random length that depends only on the input.
pub fn of(input: &[u8]) -> [Vec<&[u8]>; 2] {
    // FNV-1a, then xorshift.
    let mut state = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mut parts = Vec::new();
    let mut rest = input;
    while !rest.is_empty() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Mostly short parts, also empty ones.
        let longest = [3, 20, 400][(state >> 40) as usize % 3];
        let (part, left) = rest.split_at(rest.len().min((state >> 8) as usize % longest));
        parts.push(part);
        rest = left;
    }
    [input.chunks(1).collect(), parts]
}
