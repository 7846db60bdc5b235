//! The side HTTP endpoint: `/metrics` of a registry, probes, and a server's status page.
//!
//! # What it guarantees
//!
//! - It has threads of its own, so it answers while all others are saturated. A program stops it last.
//! - **No request can harm it.** At most 16 connections are open. A new connection takes the place of the oldest one
//!   that has no request without an answer, so silent connections keep no scrape out. A connection lives 3 seconds at
//!   most, whatever its client does. A head has 8 KiB at most, and a body is never read. Answers are HTTP/1.0: one
//!   answer, then the end.
//! - An `accept` error is counted. The endpoint waits, tries again, and never ends because of it.
//!
//! # How, and why not `tiny_http::Server`
//!
//! The endpoint is an ordinary [`Service`] on a [`Server`] of its own with two workers. So slow heads and slow readers
//! are parked like any connection and hold no worker. Of `tiny_http` (0.12.0) it uses the response types. The server of
//! `tiny_http` stops accepting for good at the first `accept` error and starts a thread for every idle connection. One
//! request can end it: an absurd `Content-Length` aborts the process. A handler cannot fix any of this. The two open
//! advisories of `tiny_http` do not apply: no transfer encoding is parsed here (CVE-2026-66752), and every header value
//! sent is a constant (CVE-2026-66753).
//!
//! What it leaves to others: the content of the metrics and probes.

mod http;
mod page;
/// Properties that hold for any bytes. Tests and fuzzers assert them.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod properties;

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{IntCounterVec, Opts, Registry};

use self::http::{Answer, Head, Parsed};
use crate::metrics::{Page, Source, collector, together};
use crate::server::{Next, Overload, Running, Server, ServerBuilder, ServerError, ServerHandle, Service};

/// Connections open at once. A scraper uses one.
const MAX_CONNECTIONS: usize = 16;

/// How long a connection may live, with head, answer and end. A scraper on the same network needs milliseconds.
const LIFETIME: Duration = Duration::from_secs(3);

/// The most bytes of a request's head. A scraper's head has a few hundred bytes.
const MAX_HEAD: usize = 8 * 1024;

/// One worker for a scrape, which may take milliseconds with thousands of workers, and one for a probe meanwhile.
const WORKERS: usize = 2;

/// How long the end waits for requests in progress.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// The label that all paths share that are not served, so that a scanner cannot create series.
const OTHER: &str = "other";

/// The answer at one path.
enum Route {
    /// The registry, as text.
    Metrics,
    /// 200, or 503 with the reason.
    Probe(Box<dyn Fn() -> Result<(), String> + Send + Sync>),
    /// The status page, which fetches the status.
    Page,
    /// The numbers of a server, as JSON.
    Status(ServerHandle),
}

/// The side HTTP endpoint, running. It runs on when this is dropped; [`stop`](Exposition::stop) ends it.
///
/// ```
/// use std::io::{Read, Write};
/// use millpond::Exposition;
///
/// let endpoint = Exposition::bind(prometheus::Registry::new(), ([127, 0, 0, 1], 0).into())?
///     .probe("/readyz", || Err("still warming up".to_owned()))
///     .start()?;
///
/// let mut client = std::net::TcpStream::connect(endpoint.local_addr())?;
/// client.write_all(b"GET /readyz HTTP/1.1\r\nHost: here\r\n\r\n")?;
/// let mut answer = String::new();
/// client.read_to_string(&mut answer)?;
/// assert!(answer.starts_with("HTTP/1.0 503"));
/// assert!(answer.ends_with("still warming up\n"));
/// endpoint.stop();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Exposition {
    running: Running,
    registry: Registry,
    requests: IntCounterVec,
}

impl Exposition {
    /// Binds an endpoint that publishes this registry at `/metrics`, and starts it.
    /// [`bind`](Exposition::bind) does it in two steps, with probes between them.
    ///
    /// # Errors
    ///
    /// As [`ServerBuilder::bind`](crate::ServerBuilder::bind) and [`Server::start`].
    ///
    /// # Panics
    ///
    /// If the registry has an endpoint already.
    pub fn serve(registry: Registry, address: SocketAddr) -> Result<Exposition, ServerError> {
        Exposition::bind(registry, address)?.start()
    }

    /// Binds an endpoint that will publish this registry at `/metrics`. Starts no thread.
    ///
    /// # Errors
    ///
    /// As [`ServerBuilder::bind`](crate::ServerBuilder::bind).
    pub fn bind(registry: Registry, address: SocketAddr) -> Result<BoundExposition, ServerError> {
        Ok(BoundExposition::new(Self::server().bind(address)?, registry))
    }

    /// As [`bind`](Exposition::bind), on a listener that another process holds too, such as a service manager that
    /// passed it on. See [`ServerBuilder::adopt`](crate::ServerBuilder::adopt).
    ///
    /// # Errors
    ///
    /// As [`ServerBuilder::adopt`](crate::ServerBuilder::adopt).
    pub fn adopt(registry: Registry, listener: TcpListener) -> Result<BoundExposition, ServerError> {
        Ok(BoundExposition::new(Self::server().adopt(listener)?, registry))
    }

    fn server() -> ServerBuilder {
        Server::builder("http")
            .workers(WORKERS)
            .max_connections(MAX_CONNECTIONS)
            .within_reserve()
            .defer_accept()
            .overload(Overload::Evict)
            .idle_timeout(None)
            .write_timeout(LIFETIME)
            .lifetime(LIFETIME)
            .drain_timeout(DRAIN_TIMEOUT)
    }

    /// The address it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.running.local_addr()
    }

    /// Stops accepting, lets requests in progress finish, half a second at most, and returns when all connections are
    /// closed. Then it takes the endpoint's own metrics out of the registry, which may have another endpoint from then
    /// on.
    pub fn stop(self) {
        let Exposition { running, registry, requests } = self;
        running.handle().drain();
        let metrics = metrics(&running, &requests);
        let _ = running.wait();
        // It fails if the user has taken them out before.
        let _ = registry.unregister(metrics);
    }
}

/// An endpoint that is bound and not yet running; see [`Exposition::bind`].
pub struct BoundExposition {
    server: Server,
    registry: Registry,
    routes: Vec<(&'static str, Route)>,
}

impl BoundExposition {
    fn new(server: Server, registry: Registry) -> Self {
        BoundExposition { server, registry, routes: vec![("/metrics", Route::Metrics)] }
    }

    /// The address it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Serves a probe at `path`: 200 and `ok` if the closure returns `Ok`, 503 and its reason otherwise. The endpoint's
    /// worker calls the closure for each request, so it should return at once. A path keeps the first route it is given.
    #[must_use]
    pub fn probe(
        mut self,
        path: &'static str,
        probe: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.routes.push((path, Route::Probe(Box::new(probe))));
        self
    }

    /// Serves a page at `/` that shows a server at work in a browser, without any other tool. Serves the numbers that
    /// the page draws at `/status.json`. The README describes both.
    ///
    /// ```
    /// use millpond::{Echo, Exposition, Server};
    ///
    /// let any_port = ([127, 0, 0, 1], 0).into();
    /// let server = Server::builder("echo").service(Echo).workers(4).bind(any_port)?.start()?;
    /// let page = Exposition::bind(prometheus::Registry::new(), any_port)?.status(server.handle()).start()?;
    /// println!("look at http://{}/", page.local_addr());
    /// # server.handle().drain();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn status(mut self, server: ServerHandle) -> Self {
        self.routes.push(("/", Route::Page));
        self.routes.push(("/status.json", Route::Status(server)));
        self
    }

    /// Starts the threads, and puts the endpoint's own metrics into the registry: those of its pool, labelled
    /// `pool="http"`, and `millpond_http_*`.
    ///
    /// # Errors
    ///
    /// As [`Server::start`].
    ///
    /// # Panics
    ///
    /// If the registry has one of these metrics already, because it has another endpoint. Then the registry stays as it
    /// is, and no thread is left.
    pub fn start(self) -> Result<Exposition, ServerError> {
        let BoundExposition { server, registry, routes } = self;
        let endpoint = Endpoint::new(registry.clone(), routes);
        let requests = endpoint.requests.clone();
        let running = server.with_service(endpoint).start()?;
        if let Err(error) = registry.register(metrics(&running, &requests)) {
            running.handle().drain();
            let _ = running.wait();
            panic!("a registry has one endpoint: {error}");
        }
        Ok(Exposition { running, registry, requests })
    }
}

impl fmt::Debug for BoundExposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.routes.iter().map(|(path, _)| path).collect();
        f.debug_struct("BoundExposition")
            .field("address", &self.local_addr())
            .field("paths", &paths)
            .finish_non_exhaustive()
    }
}

/// The endpoint's own metrics, as one collector.
fn metrics(running: &Running, requests: &IntCounterVec) -> Box<dyn Collector> {
    together(vec![
        running.pool_collector(),
        Box::new(requests.clone()),
        collector(AcceptErrors(running.accept_errors()), &[]),
    ])
}

/// The endpoint's failed accepts as a source of metrics.
struct AcceptErrors<F>(F);

impl<F: Fn() -> Vec<(&'static str, u64)> + Send + Sync> Source for AcceptErrors<F> {
    fn read(&self, page: &mut Page) {
        for (kind, count) in (self.0)() {
            page.counter(
                "millpond_http_accept_errors_total",
                "Failed accepts of the side HTTP listener, by kind. Rising, scrapes and probes may be failing too.",
                &[("kind", kind)],
                count,
            );
        }
    }
}

/// The service behind the endpoint.
struct Endpoint {
    registry: Registry,
    routes: Vec<(&'static str, Route)>,
    requests: IntCounterVec,
}

impl Endpoint {
    fn new(registry: Registry, routes: Vec<(&'static str, Route)>) -> Self {
        let help = "Requests to the side HTTP endpoint, by path and status. Paths that are not served share the value other. 503 on /readyz or /healthz is the probe saying no.";
        let requests = IntCounterVec::new(Opts::new("millpond_http_requests_total", help), &["path", "code"])
            .expect("the name, labels and help are literals, and valid");
        // All requests and their answers are known, so every series is there from the first scrape.
        for (path, route) in &routes {
            requests.with_label_values(&[*path, "200"]);
            requests.with_label_values(&[*path, "405"]);
            if let Route::Probe(_) = route {
                requests.with_label_values(&[*path, "503"]);
            }
        }
        for code in ["400", "404", "431", "505"] {
            requests.with_label_values(&[OTHER, code]);
        }
        Endpoint { registry, routes, requests }
    }

    /// The answer to a request, and the path under which it is counted.
    fn answer(&self, head: &Head<'_>) -> (&'static str, Answer) {
        let Some((path, route)) = self.routes.iter().find(|(path, _)| *path == head.path) else {
            let mut text = String::from("nothing is served here; there are");
            for (path, _) in &self.routes {
                text.push(' ');
                text.push_str(path);
            }
            text.push('\n');
            return (OTHER, Answer::text(404, text));
        };
        if !matches!(head.method, "GET" | "HEAD") {
            return (path, Answer::method_not_allowed());
        }
        let answer = match route {
            Route::Metrics => self.metrics(),
            Route::Probe(probe) => match probe() {
                Ok(()) => Answer::text(200, "ok\n"),
                Err(reason) => Answer::text(503, reason + "\n"),
            },
            Route::Page => Answer::page(page::HTML, page::POLICY),
            Route::Status(server) => {
                Answer::json(serde_json::to_vec(&server.status()).expect("plain data can be written as JSON"))
            }
        };
        (path, answer)
    }

    fn metrics(&self) -> Answer {
        match prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()) {
            Ok(text) => Answer::metrics(text),
            Err(error) => Answer::text(500, format!("the metrics cannot be written as text: {error}\n")),
        }
    }
}

impl Service for Endpoint {
    /// The part of the head that has come.
    type Session = Vec<u8>;

    fn open(&self, _peer: SocketAddr) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&self, head: &mut Vec<u8>, bytes: &mut Vec<u8>) -> Next {
        // Bytes over the limit are not kept.
        let room = (MAX_HEAD + 1).saturating_sub(head.len());
        head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        bytes.clear();
        let (path, answer, head_only) = match http::parse(head, MAX_HEAD) {
            Parsed::Incomplete => return Next::KeepOpen,
            Parsed::Head(head) => {
                let (path, answer) = self.answer(&head);
                (path, answer, head.method == "HEAD")
            }
            Parsed::Bad(answer) => (OTHER, answer, false),
        };
        self.requests.with_label_values(&[path, &answer.code.to_string()]).inc();
        answer.write(head_only, bytes);
        Next::Close
    }
}
