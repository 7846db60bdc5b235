//! `cargo run --example crawler` crawls a site with a job for each page, and each job submits jobs for the links of its page.
//!
//! The queue holds fewer jobs than a page may have links. A worker that finds it full runs the job itself, so the crawl
//! never hangs. `Pool::wait_idle` returns when no page is left to visit. The site is made up, in memory.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use millpond::Pool;

/// Pages of the site. Two links of its pages lead to pages that are not there.
const PAGES: usize = 400;

fn main() -> Result<(), Box<dyn Error>> {
    let pool = Pool::builder("crawler").workers(8).queue_capacity(4).build()?;
    let crawler = Arc::new(Crawler { pool, site: site(), seen: Mutex::default(), counts: Counts::default() });
    crawler.find("/0");
    if !crawler.pool.wait_idle(Duration::from_secs(60)) {
        return Err("the crawl takes too long".into());
    }
    let Counts { found, missing, refused } = &crawler.counts;
    println!("{} pages found, {} missing, {} refused", read(found), read(missing), read(refused));
    let drained = crawler.pool.drain(Duration::from_secs(5));
    println!("{} jobs completed, {} left", drained.stats.completed, drained.running);
    Ok(())
}

struct Crawler {
    pool: Pool,
    /// The text of each page, by its path.
    site: HashMap<String, String>,
    /// Paths for which a job was submitted.
    seen: Mutex<HashSet<String>>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    found: AtomicUsize,
    missing: AtomicUsize,
    /// Jobs that the pool gave back, because half of a worker's stack was in use.
    refused: AtomicUsize,
}

fn read(count: &AtomicUsize) -> usize {
    count.load(Ordering::Relaxed)
}

fn add_one(count: &AtomicUsize) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Crawler {
    /// Submits a job for this path, unless there was one before.
    fn find(self: &Arc<Self>, path: &str) {
        if !self.seen.lock().expect("no holder panics").insert(path.to_owned()) {
            return;
        }
        let (crawler, path) = (Arc::clone(self), path.to_owned());
        if self.pool.execute(move || crawler.visit(&path)).is_err() {
            add_one(&self.counts.refused);
        }
    }

    fn visit(self: &Arc<Self>, path: &str) {
        let Some(page) = self.fetch(path) else {
            add_one(&self.counts.missing);
            return;
        };
        add_one(&self.counts.found);
        for link in links(page) {
            self.find(link);
        }
    }

    /// A slow call that is not computation, like a request over the network.
    fn fetch(&self, path: &str) -> Option<&str> {
        thread::sleep(Duration::from_millis(1));
        self.site.get(path).map(String::as_str)
    }
}

/// The targets of `<a href="...">` in a page.
fn links(page: &str) -> impl Iterator<Item = &str> {
    page.split("<a href=\"").skip(1).filter_map(|rest| rest.split('"').next())
}

/// Each page links to the one from which it was reached, to eight others, and to some page before it.
fn site() -> HashMap<String, String> {
    let page = |number: usize| {
        let mut text = format!("<h1>Page {number}</h1>");
        let children = (8 * number + 1..=8 * number + 8).filter(|child| *child < PAGES);
        for link in children.chain([number / 8, number * 7919 % (number + 1)]) {
            let _ = write!(text, "<a href=\"/{link}\">{link}</a>");
        }
        if number % 200 == 100 {
            let _ = write!(text, "<a href=\"/old/{number}\">moved</a>");
        }
        (format!("/{number}"), text)
    };
    (0..PAGES).map(page).collect()
}
