//! A scrape of the metrics, read by a small parser of our own, and the laws every scrape must keep.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{eventually, http, try_http};

/// One scrape: every sample by its name and labels, as written.
#[derive(Clone, Debug)]
pub struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    /// Scrapes, and fails if a law is broken: every scrape of every test is checked.
    pub fn of(address: SocketAddr) -> Self {
        let response = http(address, "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n");
        assert_eq!(response.code, 200);
        let scrape = Scrape::parse(&response.body);
        assert_eq!(scrape.broken_law(), None, "{}", response.body);
        scrape
    }

    /// Waits until a scrape meets `condition` and then until no job of the echo pool waits or runs, and scrapes once
    /// more.
    ///
    /// A scrape reads its counters one after another. So the scrape that meets the condition may show other counters as
    /// they were a moment before. Also the job that met the condition may not have ended.
    pub fn after(address: SocketAddr, what: &str, condition: impl Fn(&Scrape) -> bool) -> Self {
        eventually(what, || condition(&Scrape::of(address)).then_some(()));
        eventually("no job waits or runs", || Scrape::of(address).is_quiet().then_some(()));
        Scrape::of(address)
    }

    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
            (series.to_owned(), value.parse().expect("a value is a number"))
        });
        Scrape(samples.collect())
    }

    /// The value of one series, named without the prefix: `pool_queue_depth{pool="echo"}`.
    pub fn get(&self, series: &str) -> f64 {
        let name = format!("millpond_{series}");
        *self.0.get(&name).unwrap_or_else(|| panic!("no {name} in the scrape"))
    }

    /// A series of the echo pool, by name alone.
    pub fn pool(&self, name: &str) -> f64 {
        self.get(&format!("pool_{name}{{pool=\"echo\"}}"))
    }

    /// The sum of every series of one name and a part of their labels.
    pub fn sum(&self, name: &str, labels: &str) -> f64 {
        let start = format!("millpond_{name}{{");
        let found = self.0.iter().filter(|(series, _)| series.starts_with(&start) && series.contains(labels));
        found.map(|(_, value)| value).sum()
    }

    /// Whether no job of the echo pool waited or ran, at the moment at which the pool was read. The other counters were
    /// read later.
    pub fn is_quiet(&self) -> bool {
        self.pool("workers_busy") + self.pool("queue_depth") == 0.0
    }

    pub fn connections(&self, state: &str) -> f64 {
        self.get(&format!("connections{{state=\"{state}\"}}"))
    }

    pub fn closed(&self, reason: &str) -> f64 {
        self.get(&format!("connections_closed_total{{reason=\"{reason}\"}}"))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Checks the laws that hold in every scrape. Names the laws that are broken, if any.
    pub fn broken_law(&self) -> Option<String> {
        let mut wrong = Vec::new();
        let mut check = |law: &str, holds: bool| {
            if !holds {
                wrong.push(law.to_owned());
            }
        };
        let open = self.sum("connections", "state=");
        let closed = self.sum("connections_closed_total", "reason=");
        check(
            "accepted = sum(connections) + sum(closed)",
            self.get("connections_accepted_total") == open + closed,
        );
        check("open connections <= the limit", open <= self.get("connections_limit"));
        for pool in ["echo", "http"] {
            let get = |name: &str| self.get(&format!("pool_{name}{{pool=\"{pool}\"}}"));
            let ended = self.sum("pool_jobs_total", &format!("pool=\"{pool}\""));
            let (busy, depth) = (get("workers_busy"), get("queue_depth"));
            check("submitted = jobs + depth + busy", get("submitted_total") == ended + depth + busy);
            check("busy <= workers", busy <= get("workers"));
            check("depth <= capacity", depth <= get("queue_capacity"));
        }
        check("sent <= received", self.get("sent_bytes_total") <= self.get("received_bytes_total"));
        check("one phase", self.sum("phase", "phase=") == 1.0);
        for (series, value) in &self.0 {
            check(&format!("{series} is not negative or NaN"), *value >= 0.0);
        }
        for series in self.0.keys() {
            if let Some((name, labels)) = series.split_once("_bucket{")
                && labels.contains("le=\"+Inf\"")
            {
                let others = labels.replace("le=\"+Inf\"", "").replace(",}", "}").replace("{}", "");
                let count = format!("{name}_count{{{others}").replace("{}", "");
                check(&format!("{count} is its last bucket"), self.0.get(&count) == self.0.get(series));
            }
        }
        (!wrong.is_empty()).then(|| wrong.join("; "))
    }

    /// The first counter that is lower here than in an earlier scrape.
    pub fn first_fall_since(&self, earlier: &Scrape) -> Option<String> {
        let counter = |series: &str| {
            let name = series.split('{').next().unwrap_or(series);
            ["_total", "_bucket", "_count", "_sum"].iter().any(|end| name.ends_with(end))
        };
        self.0.iter().filter(|(series, _)| counter(series)).find_map(|(series, now)| {
            let before = earlier.0.get(series)?;
            (now < before).then(|| format!("{series} fell from {before} to {now}"))
        })
    }
}

/// Scrapes all the while, checks every scrape, and notes the time of the slowest answer.
pub struct Guard {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Watched>>,
}

/// The observations of a guard.
pub struct Watched {
    pub scrapes: usize,
    pub slowest: Duration,
}

impl Guard {
    /// Starts to watch. If a scrape gets no answer, the guard ends without a failure, because the server may end first.
    pub fn over(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut watched = Watched { scrapes: 0, slowest: Duration::ZERO };
            let mut last: Option<Scrape> = None;
            while !seen.load(Ordering::Relaxed) {
                let start = Instant::now();
                let Ok(response) = try_http(address, "GET /metrics HTTP/1.1\r\nHost: guard\r\n\r\n") else {
                    break;
                };
                watched.slowest = watched.slowest.max(start.elapsed());
                watched.scrapes += 1;
                let scrape = Scrape::parse(&response.body);
                if let Some(wrong) = scrape.broken_law() {
                    panic!("{wrong}\n{}", response.body);
                }
                if let Some(fall) = last.as_ref().and_then(|last| scrape.first_fall_since(last)) {
                    panic!("{fall}\n{}", response.body);
                }
                last = Some(scrape);
                std::thread::sleep(Duration::from_millis(10));
            }
            watched
        });
        Guard { stop, thread: Some(thread) }
    }

    /// Stops watching; fails if a law was broken.
    pub fn finish(mut self) -> Watched {
        self.stop.store(true, Ordering::Relaxed);
        let watched = self.thread.take().expect("it runs").join().expect("every scrape kept the laws");
        assert!(watched.scrapes > 0, "the guard saw no scrape");
        watched
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
