//! The side HTTP endpoint: `/metrics` of a registry, probes, and a server's status page.
//!
//! # What it guarantees
//!
//! - It answers on threads of its own, so it answers while everything else is saturated. The program stops it last.
//! - **Every request is bounded.** At most 16 connections are open. A client has 3 seconds to send its request. Then it
//!   has to take some of the answer every 3 seconds. A head has at most 32 KiB, and the endpoint never reads a body.
//!   Answers are HTTP/1.0: one answer, then the end.
//! - **Attackers keep no scrape and no probe out.** At the limit a new connection takes the place of another. Which one
//!   that is, the server's `eviction.rs` argues: clients that are silent, slow to ask or do not read go before a
//!   scraper that reads slowly. A client whose request has arrived is answered before its connection can be closed.
//! - **Clients without a request take no place.** The kernel hands a connection over once its request has arrived, or
//!   after a second (`TCP_DEFER_ACCEPT`). A listener that a service manager passes on has this setting from there.
//! - Many scrapes at once cost little more than one, since they share a rendering; see `shared.rs`.
//! - **No web page of another site can read the status page** through a browser on this machine; see `host.rs`.
//! - An `accept` error is counted, and never ends the endpoint. It accepts again after a pause.
//!
//! # How, and why not `tiny_http::Server`
//!
//! The endpoint is an ordinary [`Service`] on a [`Server`] of its own with two workers. So slow heads and slow readers
//! are parked like any connection, and hold no worker. Of `tiny_http` (0.12.0) it uses the response types.
//!
//! Its server stops accepting for good at the first `accept` error, and starts a thread for every idle connection. One
//! request with an absurd `Content-Length` aborts the process. A handler can prevent none of this. Its two open
//! advisories do not apply here either: this module parses no transfer encoding (CVE-2026-66752), and every header value
//! it sends is a constant (CVE-2026-66753).
//!
//! What the metrics and probes say is left to others.

mod host;
mod http;
mod page;
/// Properties that hold for any bytes. Tests and fuzzers assert them.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod properties;
mod shared;

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use prometheus::core::Collector;
use prometheus::{IntCounterVec, Opts, Registry};

use self::host::Hosts;
use self::http::{Answer, Head, Parsed};
use self::shared::Shared;
use crate::metrics::{Page, Source, collector, together};
use crate::server::{Next, Overload, Running, Server, ServerBuilder, ServerError, ServerHandle, Service};

/// Connections open at once. A scraper uses one.
const MAX_CONNECTIONS: usize = 16;

/// How long a client may take to send its request, and the write timeout of its answer. A scraper on the same network
/// needs milliseconds for all of it.
const LIFETIME: Duration = Duration::from_secs(3);

/// The most bytes of a request's head. A scraper's has a few hundred. A browser also sends the cookies that other
/// programs on the same host name have set, whatever their port: some have 9 kB.
const MAX_HEAD: usize = 32 * 1024;

/// One worker answers a scrape, which may take milliseconds with thousands of workers. The other answers a probe
/// meanwhile.
const WORKERS: usize = 2;

/// How long the endpoint waits for requests in progress when it stops.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// The label that all paths share that are not served, so that a scanner cannot create series.
const OTHER: &str = "other";

/// The answer at one path.
enum Route {
    /// The registry, as text.
    Metrics(Shared),
    /// 200, or 503 and the reason.
    Probe(Box<dyn Fn() -> Result<(), String> + Send + Sync>),
    /// The status page, which fetches the status.
    Page,
    /// The numbers of a server, as JSON.
    Status(ServerHandle, Shared),
}

impl Route {
    /// Whether only some values of `Host` get an answer.
    fn is_guarded(&self) -> bool {
        matches!(self, Route::Page | Route::Status(..))
    }

    /// The codes that a request for it can get, the 400s for any path aside.
    fn codes(&self) -> &'static [&'static str] {
        match self {
            Route::Metrics(_) => &["200", "405"],
            Route::Probe(_) => &["200", "405", "503"],
            Route::Page | Route::Status(..) => &["200", "405", "421"],
        }
    }
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
    /// As [`ServerBuilder::bind`](crate::ServerBuilder::bind) and [`BoundExposition::start`].
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

    /// As [`bind`](Exposition::bind), on a listener that others hold too, such as a service manager that passed it
    /// on. See [`ServerBuilder::adopt`](crate::ServerBuilder::adopt).
    ///
    /// The listener should have the socket option `TCP_DEFER_ACCEPT`, one second; systemd's `DeferAcceptSec=1` sets it.
    /// Without it, silent connections take places, and while many clients connect, one may lose its place before its
    /// request arrives.
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

    /// Stops accepting, and blocks until requests in progress are answered and all connections are closed. After half a
    /// second it closes those that are left. Then it takes the endpoint's own metrics out of the registry, which may have
    /// another endpoint from then on.
    pub fn stop(self) {
        let Exposition { running, registry, requests } = self;
        let metrics = metrics(&running, &requests);
        stop(running);
        // It fails if the user has taken them out before.
        let _ = registry.unregister(metrics);
    }
}

/// An endpoint that is bound and not yet running; see [`Exposition::bind`].
pub struct BoundExposition {
    server: Server,
    registry: Registry,
    routes: Vec<(&'static str, Route)>,
    hosts: Hosts,
}

impl BoundExposition {
    fn new(server: Server, registry: Registry) -> Self {
        let routes = vec![("/metrics", Route::Metrics(Shared::default()))];
        BoundExposition { server, registry, routes, hosts: Hosts::default() }
    }

    /// The address it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Serves a probe at `path`: 200 and `ok` if the closure returns `Ok`, otherwise 503 and its reason. An endpoint's
    /// worker calls the closure for each request, so it should return at once. If a path is given twice, the first
    /// probe keeps it.
    #[must_use]
    pub fn probe(
        mut self,
        path: &'static str,
        probe: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.routes.push((path, Route::Probe(Box::new(probe))));
        self
    }

    /// Serves a page at `/` that shows a server as it works, for a browser and without any other tool. The numbers
    /// that it draws are at `/status.json`. The README describes both.
    ///
    /// Both answer only to a `Host` header that is an IP address, `localhost`, or a name given to
    /// [`status_host`](BoundExposition::status_host), and to requests without one. Any other gets 421: a web page of
    /// another site can otherwise read them through a browser on this machine (DNS rebinding).
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
        self.routes.push(("/status.json", Route::Status(server, Shared::default())));
        self
    }

    /// Lets browsers read the status page under this host name too, such as `pond.example.org`: without scheme and
    /// port. Case and a final dot do not matter. May be called for any number of names.
    ///
    /// List only names whose DNS records you control.
    #[must_use]
    pub fn status_host(mut self, name: impl AsRef<str>) -> Self {
        self.hosts.list(name.as_ref());
        self
    }

    /// Starts the threads, and puts the endpoint's own metrics into the registry: those of its pool, labelled
    /// `pool="http"`, and `millpond_http_*`.
    ///
    /// # Errors
    ///
    /// As [`Server::start`], and [`ServerError::Registry`] if the registry has these metrics already, since it serves
    /// one endpoint. Then it stops the threads again, which takes up to half a second, and leaves the registry as it was.
    pub fn start(self) -> Result<Exposition, ServerError> {
        let BoundExposition { server, registry, routes, hosts } = self;
        let endpoint = Endpoint::new(registry.clone(), routes, hosts);
        let requests = endpoint.requests.clone();
        let running = server.with_service(endpoint).start()?;
        if let Err(error) = registry.register(metrics(&running, &requests)) {
            stop(running);
            return Err(ServerError::Registry(error));
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

fn stop(running: Running) {
    running.handle().drain();
    let _ = running.wait();
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
    hosts: Hosts,
    requests: IntCounterVec,
}

/// A connection's request.
struct Request {
    /// When its connection was accepted.
    accepted: Instant,
    /// The part of the head that has arrived.
    head: Vec<u8>,
}

impl Endpoint {
    fn new(registry: Registry, routes: Vec<(&'static str, Route)>, hosts: Hosts) -> Self {
        let help = "Requests to the side HTTP endpoint, by path and status. Paths that are not served share the value other. 503 on /readyz or /healthz is the probe saying no.";
        let requests = IntCounterVec::new(Opts::new("millpond_http_requests_total", help), &["path", "code"])
            .expect("the name, labels and help are literals, and valid");
        // The paths and their codes are known, so every series is there from the first scrape.
        for (path, route) in &routes {
            for code in route.codes() {
                requests.with_label_values(&[*path, *code]);
            }
        }
        for code in ["400", "404", "431", "505"] {
            requests.with_label_values(&[OTHER, code]);
        }
        Endpoint { registry, routes, hosts, requests }
    }

    /// The answer to a request, and the path it is counted under.
    fn answer(&self, head: &Head<'_>, accepted: Instant) -> (&'static str, Answer) {
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
        if route.is_guarded() && !self.may_read_status(head) {
            return (path, Answer::misdirected());
        }
        let answer = match route {
            Route::Metrics(shared) => shared.get(accepted, || self.metrics()),
            Route::Probe(probe) => match probe() {
                Ok(()) => Answer::text(200, "ok\n"),
                Err(reason) => Answer::text(503, reason + "\n"),
            },
            Route::Page => Answer::page(page::HTML, page::POLICY),
            Route::Status(server, shared) => shared.get(accepted, || {
                Answer::json(serde_json::to_vec(&server.status()).expect("plain data can be written as JSON"))
            }),
        };
        (path, answer)
    }

    /// Whether all the names that the request gives this server are allowed.
    fn may_read_status(&self, head: &Head<'_>) -> bool {
        let names = [head.authority.map(str::as_bytes), head.host];
        names.into_iter().flatten().all(|name| self.hosts.allow(name))
    }

    fn metrics(&self) -> Answer {
        match prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()) {
            Ok(text) => Answer::metrics(text),
            Err(error) => Answer::text(500, format!("the metrics cannot be written as text: {error}\n")),
        }
    }
}

impl Service for Endpoint {
    type Session = Request;

    fn open(&self, _peer: SocketAddr) -> Request {
        Request { accepted: Instant::now(), head: Vec::new() }
    }

    fn serve(&self, request: &mut Request, bytes: &mut Vec<u8>) -> Next {
        let Request { accepted, head } = request;
        // One byte over the limit decides. The rest is not even kept.
        let room = (MAX_HEAD + 1).saturating_sub(head.len());
        head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        bytes.clear();
        let (path, answer, head_only) = match http::parse(head, MAX_HEAD) {
            Parsed::Incomplete => return Next::KeepOpen,
            Parsed::Head(head) => {
                let (path, answer) = self.answer(&head, *accepted);
                (path, answer, head.method == "HEAD")
            }
            Parsed::Bad(answer) => (OTHER, answer, false),
        };
        self.requests.with_label_values(&[path, &answer.code.to_string()]).inc();
        answer.write(head_only, bytes);
        Next::Close
    }
}
