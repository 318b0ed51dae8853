#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| anteroom_fuzz::h2_unread::holds(input));
