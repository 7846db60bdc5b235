//! `cargo run --example fetch` fetches two URLs at once; `cargo run --example fetch -- URL URL` fetches yours.
//!
//! This is the usual way to use a pool: submit two jobs that block, do something else, then take both results. Without
//! URLs it starts a metrics endpoint of its own, and fetches from that.

use std::error::Error;
use std::time::Duration;

use millpond::{Exposition, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let registry = prometheus::Registry::new();
    let pool = Pool::builder("fetch").workers(2).registry(&registry).build()?;
    let endpoint =
        Exposition::bind(registry, "127.0.0.1:0".parse()?)?.probe("/healthz", || Ok(())).start()?;
    let mut urls: Vec<String> = std::env::args().skip(1).collect();
    if urls.is_empty() {
        let own = |path| format!("http://{}/{path}", endpoint.local_addr());
        urls = vec![own("metrics"), own("healthz")];
    }

    let jobs: Vec<_> = urls
        .into_iter()
        .map(|url| pool.with_deadline(Duration::from_secs(5)).submit(move || fetch(&url)))
        .collect::<Result<_, _>>()?;
    println!("{} fetches submitted", jobs.len());
    for job in jobs {
        // The outer error is a panic, or a deadline that has passed. The inner error is one that the fetch returned.
        match job.join()? {
            Ok(page) => println!("{}: {} lines", page.path, page.lines),
            Err(error) => println!("{error}"),
        }
    }
    let drained = pool.drain(Duration::from_secs(5));
    println!("{} jobs completed, {} left", drained.stats.completed, drained.running);
    endpoint.stop();
    Ok(())
}

struct Page {
    path: String,
    lines: usize,
}

fn fetch(url: &str) -> Result<Page, ureq::Error> {
    let body = ureq::get(url).call()?.body_mut().read_to_string()?;
    let path = url.splitn(4, '/').nth(3).unwrap_or_default();
    Ok(Page { path: format!("/{path}"), lines: body.lines().count() })
}
