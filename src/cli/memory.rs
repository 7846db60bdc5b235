//! Whether the limit on the process's address space leaves room for what it will run.
//!
//! Under a limit that is too low the system refuses memory at any moment: to a thread that begins, or to a
//! connection, and a program that is refused memory ends where it stands. So it is looked at before any thread
//! starts.

use rustix::process::{Resource, getrlimit};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// What a thread takes beside its stack: a guard page, the stack of its signal handler, and what the allocator keeps
/// for it.
const BESIDE_A_STACK: u64 = 32 * KIB;

/// What is needed beside the workers' stacks: the stacks of the other threads, 9 MiB of them; read buffers, 4 MiB;
/// and connections, with what is kept for clients that read slowly, at 64 KiB each.
const BESIDE_THE_WORKERS: u64 = 32 * MIB;

/// `Err` says what is needed, what there is, and what to change.
pub(crate) fn suffices(workers: usize, stack_size: usize) -> Result<(), String> {
    match getrlimit(Resource::As).current {
        Some(limit) => fits(workers as u64, stack_size as u64, limit.saturating_sub(used())),
        None => Ok(()),
    }
}

/// The address space in use. Without `/proc`, what a program of this size has at its start.
fn used() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let size =
        status.lines().find_map(|line| line.strip_prefix("VmSize:")?.split_whitespace().next()?.parse().ok());
    size.map_or(6 * MIB, |kib: u64| kib * KIB)
}

fn fits(workers: u64, stack_size: u64, left: u64) -> Result<(), String> {
    let each = stack_size.saturating_add(BESIDE_A_STACK);
    let needed = workers.saturating_mul(each).saturating_add(BESIDE_THE_WORKERS);
    if needed <= left {
        return Ok(());
    }
    let fewer = match left.saturating_sub(BESIDE_THE_WORKERS) / each {
        0 => String::new(),
        most => format!("at most {most}, "),
    };
    let (needed, left) = (needed.div_ceil(MIB), left / MIB);
    Err(format!(
        "--workers: {workers} workers and what else is needed take {needed} MiB of address space, and the limit leaves \
         {left}; give {fewer}a smaller --stack-size, or raise the limit (ulimit -v)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_that_is_named_fits_and_one_more_does_not() {
        let left = 40 * MIB;
        let error = fits(128, 256 * KIB, left).expect_err("128 take more");
        assert!(error.contains("take 68 MiB") && error.contains("leaves 40;"), "{error}");
        let most = error.split("at most ").nth(1).and_then(|rest| rest.split(',').next());
        let most = most.expect("a number").parse().expect("a number");
        assert_eq!(fits(most, 256 * KIB, left), Ok(()));
        assert!(fits(most + 1, 256 * KIB, left).is_err());
        let none = fits(1, 256 * KIB, MIB).expect_err("not even one");
        assert!(!none.contains("at most"), "{none}");
    }

    #[test]
    fn no_limit_is_no_reason() {
        assert!(used() > MIB);
        assert_eq!(fits(10_000, 1024 * MIB, u64::MAX), Ok(()));
        assert!(fits(u64::MAX, u64::MAX, u64::MAX - 1).is_err());
    }
}
