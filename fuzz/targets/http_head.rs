//! Any bytes to the side HTTP endpoint. See `src/exposition/properties.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| millpond::exposition::properties::check_bytes(bytes));
