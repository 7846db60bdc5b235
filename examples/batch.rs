//! `cargo run --release --example batch` works through 5,000 jobs that block, with a progress bar and metrics.
//!
//! `Pool::map` keeps the results in order and the memory bounded, whatever the number of items. While it runs,
//! `curl` the address it prints.

use std::error::Error;
use std::thread;
use std::time::Duration;

use indicatif::ProgressBar;
use millpond::{Exposition, Pool};

const ITEMS: u64 = 5_000;

fn main() -> Result<(), Box<dyn Error>> {
    let registry = prometheus::Registry::new();
    let pool = Pool::builder("batch").workers(64).queue_capacity(128).registry(&registry).build()?;
    let endpoint = Exposition::serve(registry, "127.0.0.1:0".parse()?)?;
    println!("metrics on http://{}/metrics", endpoint.local_addr());

    let bar = ProgressBar::new(ITEMS);
    let (mut sum, mut failed) = (0, 0);
    // It looks twice as far ahead as there are workers, so that none is idle.
    for result in bar.wrap_iter(pool.map(0..ITEMS, look_up).look_ahead(128)) {
        match result {
            Ok(price) => sum += price,
            Err(error) => {
                // It names the item. The line appears above the bar.
                bar.println(error.to_string());
                failed += 1;
            }
        }
    }
    bar.finish();
    println!("{ITEMS} items, {failed} failed, sum {sum}");
    let stats = pool.drain(Duration::from_secs(10)).stats;
    println!("{} completed, {} panicked", stats.completed, stats.panicked);
    endpoint.stop();
    Ok(())
}

/// A slow call that is not computation, like a query of a database.
fn look_up(item: u64) -> u64 {
    thread::sleep(Duration::from_millis(1 + item % 20));
    // One item in a thousand is bad. Its job fails, and the batch goes on. `resume_unwind` does not call the panic
    // hook, which would print into the progress bar.
    if item % 1000 == 999 {
        std::panic::resume_unwind(Box::new("no such item"));
    }
    item % 7
}
