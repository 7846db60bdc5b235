//! `cargo run --example await_blocking` awaits blocking jobs in async code, and does not block the runtime's one thread.
//!
//! A `JobHandle` is a `Future` on any executor. This executor is tokio's. Its `spawn_blocking` has an unbounded queue
//! without metrics, so the jobs go to a pool with a bound, deadlines and metrics instead.

use std::error::Error;
use std::sync::mpsc;
use std::time::Duration;

use millpond::{JobError, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let pool = Pool::builder("blocking").workers(2).queue_capacity(16).build()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(async {
        // `submit_async` waits for room in the queue, and holds no thread. `try_submit` would give the job back instead.
        let (turn, disk) = mpsc::channel::<()>();
        let slow = pool.submit_async(move || {
            // Blocks its worker until the disk has turned.
            disk.recv().ok();
            "read from a slow disk"
        });
        let slow = slow.await?;
        let bad = pool.submit_async(|| -> u32 { std::panic::resume_unwind(Box::new("bad sector")) }).await?;
        match bad.await {
            Err(JobError::Panicked(panic)) => println!("a job panicked: {}", panic.message()),
            other => println!("unexpected: {other:?}"),
        }
        tokio::spawn(async move {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            println!("the runtime's only thread ticked five times meanwhile");
            turn.send(()).ok();
        });
        println!("a job {}", slow.await?);
        Ok(())
    })
}
