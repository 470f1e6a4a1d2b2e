//! libFuzzer's way into `quorum_blk_fuzz::record`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| quorum_blk_fuzz::record::run(input));
