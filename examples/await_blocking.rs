//! `cargo run --example await_blocking` awaits blocking jobs in async code, whose one thread goes on meanwhile.
//!
//! A `JobHandle` is a `Future` on any executor. Here it is tokio's, but in place of `spawn_blocking`, whose
//! queue is unbounded and shows nothing of itself, the jobs go to a pool with a bound, deadlines and metrics.

use std::error::Error;
use std::time::Duration;

use millpond::{JobError, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let pool = Pool::builder("blocking").workers(2).queue_capacity(16).build()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(async {
        let ticks = tokio::spawn(async {
            let mut ticks = 0_u32;
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                ticks += 1;
                if ticks == 5 {
                    println!("the runtime's only thread ticked five times meanwhile");
                }
            }
        });

        // `try_submit` never blocks, and gives the job back when the pool is full: shed load, or try later.
        let slow = pool.try_submit(|| {
            std::thread::sleep(Duration::from_millis(200));
            "read from a slow disk"
        })?;
        let bad = pool.try_submit(|| -> u32 { std::panic::resume_unwind(Box::new("bad sector")) })?;
        match bad.await {
            Err(JobError::Panicked(message)) => println!("a job panicked: {message}"),
            other => println!("unexpected: {other:?}"),
        }
        println!("a job {}", slow.await?);
        ticks.abort();
        Ok(())
    })
}
