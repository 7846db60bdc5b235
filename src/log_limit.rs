//! A bound on how often one kind of event is logged.
//!
//! What is logged has a counter beside it, so a line that is left out loses no information; the next line
//! that is written says how many were.

use std::sync::Mutex;

use crate::sync::lock;

/// Lines of one kind in one second.
const LINES_PER_SECOND: u32 = 10;

/// Decides whether a line may be written.
#[derive(Debug, Default)]
pub(crate) struct LogLimit(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    second: u64,
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    /// `Some` when a line may be written now, with the number of lines left out since the last one.
    pub(crate) fn allow(&self, now_ns: u64) -> Option<u64> {
        let mut window = lock(&self.0);
        let second = now_ns / 1_000_000_000;
        if window.second != second {
            window.second = second;
            window.lines = 0;
        }
        if window.lines == LINES_PER_SECOND {
            window.left_out += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_second_and_then_the_number_left_out() {
        let limit = LogLimit::default();
        let second = 1_000_000_000;
        let written = (0..25).filter(|at| limit.allow(5 * second + at).is_some()).count();
        assert_eq!(written, 10);
        assert_eq!(limit.allow(6 * second), Some(15));
        assert_eq!(limit.allow(6 * second + 1), Some(0));
    }
}
