//! A TCP server that runs any [`Service`] on a bounded pool of workers.
//!
//! # What it guarantees
//!
//! - **A silent connection holds no worker.** One thread, the reactor, waits for all connections. Only a connection with
//!   something to do becomes a job, so a few workers serve any number of connections up to the limit.
//! - **A slow reader holds no worker either.** The server keeps the output that a client does not take, which is bounded.
//!   It reads nothing from that client until the client has taken it.
//! - **Everything is bounded**: workers, queue, connections, bytes kept for each, silence, stalls, and the drain.
//! - **Nothing that was read is lost**: the server answers every byte it has read before it closes the connection. The
//!   exceptions are the drain's deadline, the write timeout and failures, and each is counted. When the server closes a
//!   connection, no reset destroys data still on its way.
//! - **The numbers are true** at every moment. `metrics.rs` here and in the pool say how.
//!
//! # What it leaves to others
//!
//! - What bytes mean: the [`Service`].
//! - Signals: a program's handler calls [`ServerHandle::drain`].
//! - How metrics are published: [`Running::register`] puts them into a registry. The server knows no HTTP.
//!
//! # Flow
//!
//! ```text
//!  kernel backlog      ready sockets           jobs                    bytes
//!  ──────────────▶ reactor ─────────▶ queue ─────────▶ workers 1..N ─────────▶ Service
//!    door.rs       │      ▲ parked: costs no worker      │  turn.rs
//!                  │      └──────────────────────────────┘ would block
//!                  └ timers, lingering, drain
//! ```
//!
//! `gate.rs` is the state machine that decides which thread may touch a connection. It argues that no wake-up is lost.

mod buffers;
mod closing;
mod connection;
mod deferred;
mod descriptors;
mod door;
mod drain;
mod eviction;
mod gate;
mod kernel;
mod listening;
mod metrics;
mod reactor;
mod reaper;
mod report;
mod service;
mod status;
mod stint;
mod turn;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use prometheus::Registry;

use self::buffers::Buffers;
use self::connection::Connection;
pub use self::descriptors::{DEFAULT_CONNECTIONS_CAP, RESERVED_DESCRIPTORS, raise_descriptor_limit};
pub use self::door::Overload;
use self::door::{Ballast, Door, Holder};
use self::metrics::{Cell, Ledger, Reason};
use self::reactor::Reactor;
use self::reaper::Reaper;
pub use self::report::Report;
pub use self::service::{Echo, Laboured, Next, Service};
use self::turn::{Attendant, Job};
use crate::clock::Clock;
use crate::lifecycle::{Lifecycle, Phase};
use crate::log_limit::LogLimit;
use crate::pool::{self, Meter, PoolError, Workers};

/// The stack of a worker that serves connections, unless set: enough for a service that does no deep recursion.
pub const DEFAULT_SERVICE_STACK_SIZE: usize = 256 * 1024;

/// Listen backlog unless set. std's own is 128. If the listen queue is full, a client tries again after a second.
pub const DEFAULT_BACKLOG: u32 = 4096;

/// How long a connection is silent before the kernel probes whether its client is still there, unless set. Shorter than the
/// silence after which usual firewalls and address translators forget a connection, which is five minutes or more.
pub const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(120);

/// The reactor's longest wait for events.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The reactor counts as stuck if it has not looked for events for this long.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// The settings of a server. [`Server::builder`] makes one, and [`bind`](ServerBuilder::bind) makes a server of it.
#[derive(Clone, Debug)]
pub struct ServerBuilder<S = ()> {
    service: S,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    name: String,
    workers: usize,
    stack_size: usize,
    max_connections: Option<usize>,
    spare_descriptors: usize,
    timed: bool,
    within_reserve: bool,
    defer_accept: bool,
    overload: Overload,
    backlog: u32,
    limits: Limits,
}

/// The server's limits in time. `None` is no limit.
#[derive(Clone, Debug)]
struct Limits {
    queue_wait: Option<Duration>,
    idle: Option<Duration>,
    /// As in force: see [`listening::keepalive_in_force`].
    keepalive: Option<Duration>,
    write: Duration,
    /// How long a connection may live in all.
    lifetime: Option<Duration>,
    lame_duck: Duration,
    drain: Duration,
}

impl<S> ServerBuilder<S> {
    /// Sets the service, which decides what is done with the bytes. A server without one cannot be started.
    #[must_use]
    pub fn service<T: Service>(self, service: T) -> ServerBuilder<T> {
        ServerBuilder { service, settings: self.settings }
    }

    /// Sets the number of workers, 1 to [`MAX_WORKERS`](crate::MAX_WORKERS). Unless set, 128.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.settings.workers = workers;
        self
    }

    /// Sets each worker's stack in bytes. Unless set, [`DEFAULT_SERVICE_STACK_SIZE`].
    #[must_use]
    pub fn stack_size(mut self, bytes: usize) -> Self {
        self.settings.stack_size = bytes;
        self
    }

    /// Sets how many connections may be open, at least 1. Unless set, it is the limit on descriptors less
    /// [`RESERVED_DESCRIPTORS`], and at most [`DEFAULT_CONNECTIONS_CAP`].
    #[must_use]
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.settings.max_connections = Some(connections);
        self
    }

    /// Counts the server as overloaded while the connection that has waited longest for a worker has waited
    /// longer than this. Unless set, it never is.
    #[must_use]
    pub fn max_queue_wait(mut self, wait: Duration) -> Self {
        self.settings.limits.queue_wait = Some(wait);
        self
    }

    /// Sets what happens to new connections at the connection limit or in overload. Unless set, [`Overload::Wait`].
    #[must_use]
    pub fn overload(mut self, overload: Overload) -> Self {
        self.settings.overload = overload;
        self
    }

    /// Sets the listen backlog: the most connections that the kernel keeps until they are accepted. Unless set,
    /// [`DEFAULT_BACKLOG`].
    ///
    /// The kernel cuts it to `net.core.somaxconn` without an error; [`Server::backlog`] is what is in force. A listener that
    /// is [adopted](ServerBuilder::adopt) keeps its own.
    #[must_use]
    pub fn backlog(mut self, backlog: u32) -> Self {
        self.settings.backlog = backlog;
        self
    }

    /// Closes a connection that has been silent for this long; `None` is never. Unless set, five minutes.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.settings.limits.idle = timeout;
        self
    }

    /// Has the kernel probe a client that has been silent for this long; `None` is never. Unless set,
    /// [`DEFAULT_KEEPALIVE`].
    ///
    /// Five probes follow, a fifth of `time` apart and at least 1 s. If the client's machine answers none, the connection
    /// is closed with reason `error`: about twice `time` after it was last heard of. If it answers that it knows no such
    /// connection, that happens at the first probe. A probe is no message: the idle timeout runs on.
    ///
    /// The kernel counts in seconds and takes 1 to 32,767 (nine hours). A fraction is rounded up, and `time` is moved into
    /// that range. [`adopt`](ServerBuilder::adopt) with `None` leaves each connection as the listener's owner set it up.
    ///
    /// The kernel does not probe while it waits for a client to acknowledge output: it sends the output again instead. If a
    /// client vanishes with output that the kernel has no room for, the [write timeout](ServerBuilder::write_timeout)
    /// closes the connection. With less output, the kernel gives up after `net.ipv4.tcp_retries2`, 15 minutes or more, unless the
    /// [idle timeout](ServerBuilder::idle_timeout) comes first.
    #[must_use]
    pub fn keepalive(mut self, time: Option<Duration>) -> Self {
        self.settings.limits.keepalive = time.map(listening::keepalive_in_force);
        self
    }

    /// Closes a connection whose client has output to take and whose system has acknowledged none of it for this long.
    /// Unless set, 30 seconds; at least 250 ms, because an acknowledgement takes a round trip.
    ///
    /// A client's system acknowledges in steps when the client reads slowly: up to some tens of kilobytes on a network,
    /// and half a megabyte on the loopback interface. A client that needs longer for such a step is closed.
    #[must_use]
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.settings.limits.write = timeout;
        self
    }

    /// Sets how long the server still accepts connections after [`ServerHandle::drain`], while it is already not ready.
    /// Unless set, zero.
    #[must_use]
    pub fn lame_duck(mut self, duration: Duration) -> Self {
        self.settings.limits.lame_duck = duration;
        self
    }

    /// Sets how long a drain may take. Connections that are then still open are closed and counted as cut. Unless set, 30
    /// seconds.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.settings.limits.drain = timeout;
        self
    }

    /// Closes every connection this long after it was accepted, in whatever state it is.
    #[must_use]
    pub(crate) fn lifetime(mut self, lifetime: Duration) -> Self {
        // It closes the connections of vanished clients too.
        self.settings.limits.keepalive = None;
        self.settings.limits.lifetime = Some(lifetime);
        self
    }

    /// Counts the server's connections within [`RESERVED_DESCRIPTORS`], not beside them.
    #[must_use]
    pub(crate) fn within_reserve(mut self) -> Self {
        self.settings.within_reserve = true;
        self
    }

    /// Accepts a connection once its client has sent something; see `deferred.rs`. It changes a listener that
    /// [`bind`](ServerBuilder::bind) makes, and none that is adopted: that one has other holders.
    #[must_use]
    pub(crate) fn defer_accept(mut self) -> Self {
        self.settings.defer_accept = true;
        self
    }

    /// Holds this many spare descriptors, within [`RESERVED_DESCRIPTORS`]. Unless set, none. When descriptors run out, the
    /// server closes the spare ones, so that the rest of the process can open files.
    #[must_use]
    pub fn spare_descriptors(mut self, count: usize) -> Self {
        self.settings.spare_descriptors = count;
        self
    }

    /// As [`PoolBuilder::timed`](crate::PoolBuilder::timed), to measure what measuring costs.
    #[doc(hidden)]
    #[must_use]
    pub fn timed(mut self, timed: bool) -> Self {
        self.settings.timed = timed;
        self
    }

    /// Binds the listener. Starts no thread; [`Server::start`] begins to accept connections.
    ///
    /// # Errors
    ///
    /// - [`ServerError::Pool`] if the number of workers is out of range.
    /// - [`ServerError::ConnectionLimit`] if more connections are asked for than descriptors allow.
    /// - [`ServerError::Bind`] and [`ServerError::Setup`] with the system's error.
    pub fn bind(self, address: SocketAddr) -> Result<Server<S>, ServerError> {
        let max_connections = self.settings.max_connections()?;
        let listener = listening::listen(address, self.settings.backlog, self.settings.limits.keepalive)
            .map_err(|source| ServerError::Bind { address, source })?;
        if self.settings.defer_accept {
            deferred::defer_accept(&listener).map_err(ServerError::Setup)?;
        }
        self.behind(listener, Holder::Alone, max_connections)
    }

    /// Takes over a listener that another process may hold too, such as a service manager that passed it on. Starts no
    /// thread; [`Server::start`] begins to accept connections.
    ///
    /// Every change to the listener is a change for its other holders, so the server only makes it non-blocking. Its
    /// backlog stays as it is. A drain stops accepting after a quarter of a second at the latest. Clients that connect
    /// later wait in the listen queue until another holder accepts them. If there is no other holder, they are reset.
    ///
    /// # Errors
    ///
    /// As [`bind`](ServerBuilder::bind), and [`ServerError::NotListening`] for a socket that does not listen.
    pub fn adopt(self, listener: std::net::TcpListener) -> Result<Server<S>, ServerError> {
        let max_connections = self.settings.max_connections()?;
        if !socket2::SockRef::from(&listener).is_listener().map_err(ServerError::Setup)? {
            return Err(ServerError::NotListening);
        }
        listener.set_nonblocking(true).map_err(ServerError::Setup)?;
        self.behind(mio::net::TcpListener::from_std(listener), Holder::Shared, max_connections)
    }

    /// Makes the server of a listener.
    fn behind(
        self,
        listener: mio::net::TcpListener,
        holder: Holder,
        max_connections: usize,
    ) -> Result<Server<S>, ServerError> {
        let ServerBuilder { service, settings } = self;
        let address = listener.local_addr().map_err(ServerError::Setup)?;
        let backlog = kernel::listen_queue(&listener).ok().map(|queue| queue.limit);
        let ballast = Ballast::new(settings.spare_descriptors).map_err(ServerError::Setup)?;
        let poll = mio::Poll::new().map_err(ServerError::Setup)?;
        let waker = mio::Waker::new(poll.registry(), reactor::WAKER).map_err(ServerError::Setup)?;
        let clock = Clock::start();
        let (notes, inbox) = unbounded();
        let core = Arc::new(Core {
            clock,
            started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            lifecycle: Arc::new(Lifecycle::default()),
            ledger: Ledger::new(settings.workers),
            max_connections,
            backlog,
            limits: settings.limits.clone(),
            // Sockets accepted from a listener of our own inherit it.
            keepalive_on_accept: settings.limits.keepalive.filter(|_| holder == Holder::Shared),
            overload: settings.overload,
            waker,
            notes,
            wants_notes: AtomicBool::new(false),
            strain: AtomicU8::new(0),
            heartbeat_ns: AtomicU64::new(clock.now_ns()),
            buffers: Buffers::default(),
            panic_log: LogLimit::default(),
        });
        let door = Door::new(listener, holder, ballast);
        Ok(Server { service, bound: Bound { core, settings, address, door, poll, inbox } })
    }
}

impl Settings {
    /// The most connections that may be open at once, after a check of the settings.
    fn max_connections(&self) -> Result<usize, ServerError> {
        if !(1..=pool::MAX_WORKERS).contains(&self.workers) {
            return Err(ServerError::Pool(PoolError::Workers(self.workers)));
        }
        let allowed = if self.within_reserve { usize::MAX } else { descriptors::connections_allowed() };
        let asked = self.max_connections.unwrap_or(allowed.min(DEFAULT_CONNECTIONS_CAP));
        if asked == 0 || asked > allowed {
            let descriptors = descriptors::descriptor_limit();
            return Err(ServerError::ConnectionLimit { asked, allowed, descriptors });
        }
        Ok(asked)
    }
}

/// How many workers can run at once beside the reactor.
fn enough_awake() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().saturating_sub(1).max(1))
}

/// A server that is bound and not yet running.
///
/// ```
/// use std::io::{Read, Write};
/// use millpond::{Echo, Server};
///
/// let any_port = ([127, 0, 0, 1], 0).into();
/// let server = Server::builder("echo").service(Echo).workers(2).max_connections(10).bind(any_port)?;
/// let address = server.local_addr();
/// let running = server.start()?;
///
/// let mut client = std::net::TcpStream::connect(address)?;
/// client.write_all(b"hello")?;
/// let mut answer = [0; 5];
/// client.read_exact(&mut answer)?;
/// assert_eq!(&answer, b"hello");
///
/// running.handle().drain();
/// let report = running.wait().expect("the reactor ran to its end");
/// assert_eq!((report.accepted, report.received, report.sent, report.cut), (1, 5, 5, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Server<S = ()> {
    service: S,
    bound: Bound,
}

/// The parts of a bound server that do not depend on its service.
struct Bound {
    core: Arc<Core>,
    settings: Settings,
    address: SocketAddr,
    door: Door,
    poll: mio::Poll,
    inbox: Receiver<Note>,
}

impl Server {
    /// Returns the settings of a new server. `name` names its pool and its threads: see
    /// [`Pool::builder`](crate::Pool::builder).
    pub fn builder(name: impl Into<String>) -> ServerBuilder {
        let settings = Settings {
            name: name.into(),
            workers: 128,
            stack_size: DEFAULT_SERVICE_STACK_SIZE,
            max_connections: None,
            spare_descriptors: 0,
            timed: true,
            within_reserve: false,
            defer_accept: false,
            overload: Overload::Wait,
            backlog: DEFAULT_BACKLOG,
            limits: Limits {
                queue_wait: None,
                idle: Some(Duration::from_secs(300)),
                keepalive: Some(DEFAULT_KEEPALIVE),
                write: Duration::from_secs(30),
                lifetime: None,
                lame_duck: Duration::ZERO,
                drain: Duration::from_secs(30),
            },
        };
        ServerBuilder { service: (), settings }
    }
}

impl<S> Server<S> {
    /// The address that the server is bound to. If port 0 was asked for, it has the port that the system chose.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.bound.address
    }

    /// The most connections that will be open at once.
    #[must_use]
    pub fn max_connections(&self) -> usize {
        self.bound.core.max_connections
    }

    /// The listen backlog in force: what [`ServerBuilder::backlog`] asked for, after the kernel has cut it. For an adopted
    /// listener it is the listener's own. `None` if the kernel does not tell.
    #[must_use]
    pub fn backlog(&self) -> Option<u32> {
        self.bound.core.backlog
    }
}

impl Server {
    /// Sets the service of a server that is bound already.
    pub(crate) fn with_service<S: Service>(self, service: S) -> Server<S> {
        Server { service, bound: self.bound }
    }
}

impl<S: Service> Server<S> {
    /// Starts the workers and the reactor, to run the service.
    ///
    /// # Errors
    ///
    /// [`ServerError::Pool`] if the workers cannot be started, [`ServerError::Thread`] and [`ServerError::Setup`] if the
    /// reactor cannot. No thread is left running.
    pub fn start(self) -> Result<Running, ServerError> {
        let Server { service, bound } = self;
        let (core, service, address) = (Arc::clone(&bound.core), Arc::new(service), bound.address);
        let name = bound.settings.name.clone();
        let pool = pool::Settings {
            name: name.clone(),
            workers: bound.settings.workers,
            // A connection is in the queue at most once, so the queue has room for all, and the reactor never blocks on
            // it.
            queue_capacity: core.max_connections,
            stack_size: bound.settings.stack_size,
            clock: core.clock,
            timed: bound.settings.timed,
            enough_awake: (!service.may_block()).then(enough_awake),
            hooks: pool::Hooks::default(),
        };
        let attendant = {
            let (core, service) = (Arc::clone(&core), Arc::clone(&service));
            move |number| Attendant::new(Arc::clone(&core), Arc::clone(&service), number)
        };
        let pool: Workers<Job<S>> = Workers::start(pool, attendant).map_err(ServerError::Pool)?;
        let handle = ServerHandle { core: Arc::clone(&core), pool: pool.meter() };
        let reaper = Reaper::start(&name, Arc::clone(&core)).map_err(ServerError::Thread)?;
        let mut reactor = Reactor::new(bound, service, pool, reaper).map_err(ServerError::Setup)?;
        let (report, outcome) = bounded(1);
        std::thread::Builder::new()
            .name(format!("mill-{name}"))
            .spawn(move || {
                // If the reactor panics, `report` is dropped unsent, and `wait` returns `None`.
                let ended = reactor.run();
                // It may hold the last reference to the service, whose destructor may panic.
                pool::quietly(|| drop(reactor));
                let _ = report.send(ended);
            })
            .map_err(ServerError::Thread)?;
        Ok(Running { handle, outcome, address })
    }
}

impl<S> fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("address", &self.bound.address).finish_non_exhaustive()
    }
}

/// A server that is running. [`ServerHandle::drain`] ends it; dropping this does not.
pub struct Running {
    handle: ServerHandle,
    outcome: Receiver<Report>,
    address: SocketAddr,
}

impl Running {
    /// Returns a handle that reads the server's state and ends it. Handles may be cloned and sent to other threads.
    #[must_use]
    pub fn handle(&self) -> ServerHandle {
        self.handle.clone()
    }

    /// The address that the server listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Puts every metric of the server, its phase and its pool into a registry: all of them, or none on an error. The
    /// pool's are labelled with the server's name, the others are not. So a registry takes one server, and any number of
    /// pools. [`ServerHandle::unregister`] takes them out again.
    ///
    /// # Errors
    ///
    /// If the registry has one of the metrics already. Then it stays as it is.
    pub fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(self.handle.collector())
    }

    /// A collector of the metrics of the server's pool alone.
    pub(crate) fn pool_collector(&self) -> Box<dyn prometheus::core::Collector> {
        pool::collector(Arc::clone(&self.handle.pool))
    }

    /// Returns a function that reads the failed accepts so far, by the name of their kind.
    pub(crate) fn accept_errors(&self) -> impl Fn() -> Vec<(&'static str, u64)> + use<> {
        let core = Arc::clone(&self.handle.core);
        move || core.ledger.failed_accepts().collect()
    }

    /// Blocks until the server has drained; `None` if its reactor panicked.
    #[must_use]
    pub fn wait(self) -> Option<Report> {
        self.outcome.recv().ok()
    }

    /// The channel that receives the report when the server has drained. If the reactor panicked, it disconnects without
    /// one. With it a program waits for this and for other events at once.
    #[must_use]
    pub fn finished(&self) -> &Receiver<Report> {
        &self.outcome
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Reads the state of a running server, and drains it.
#[derive(Clone)]
pub struct ServerHandle {
    core: Arc<Core>,
    pool: Arc<dyn Meter>,
}

impl ServerHandle {
    /// Begins the shutdown: lame duck, then drain, then stop. Returns at once. A second call changes nothing.
    pub fn drain(&self) {
        self.core.lifecycle.request_drain();
        self.core.wake();
    }

    /// The phase the server is in.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.core.lifecycle.phase()
    }

    /// Whether the reactor is alive. It looks for events at least once a second.
    ///
    /// # Errors
    ///
    /// How long ago it last did, if that is longer than five seconds.
    pub fn health(&self) -> Result<(), Duration> {
        let since_ns =
            self.core.clock.now_ns().saturating_sub(self.core.heartbeat_ns.load(Ordering::Relaxed));
        let since = Duration::from_nanos(since_ns);
        // A stopped server has no reactor that could be stuck.
        if since > STUCK_AFTER && self.phase() != Phase::Stopped { Err(since) } else { Ok(()) }
    }

    /// Whether the server takes new work.
    ///
    /// # Errors
    ///
    /// The reason, if it does not.
    pub fn readiness(&self) -> Result<(), NotReady> {
        match self.phase() {
            Phase::Serving => {}
            phase => return Err(NotReady::Phase(phase)),
        }
        match self.core.strain.load(Ordering::Relaxed) {
            FULL => return Err(NotReady::Full(self.core.max_connections)),
            STARVED => return Err(NotReady::OutOfDescriptors),
            _ => {}
        }
        if let Some(limit) = self.core.limits.queue_wait {
            let oldest = self.pool.oldest_age();
            if oldest > limit {
                return Err(NotReady::Overloaded { oldest, limit });
            }
        }
        Ok(())
    }
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandle").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

/// Why a server takes no new work now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotReady {
    /// It is in this phase of its shutdown, or has stopped.
    Phase(Phase),
    /// As many connections are open as the limit allows, which is this number.
    Full(usize),
    /// The process has run out of descriptors.
    OutOfDescriptors,
    /// Connections wait too long for a worker.
    Overloaded {
        /// How long the oldest of them has waited.
        oldest: Duration,
        /// How long a connection may wait.
        limit: Duration,
    },
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotReady::Phase(phase) => write!(f, "{phase}"),
            NotReady::Full(limit) => write!(f, "at the limit of {limit} connections"),
            NotReady::OutOfDescriptors => f.write_str("out of file descriptors"),
            NotReady::Overloaded { oldest, limit } => {
                write!(f, "overloaded: the oldest connection has waited {oldest:.3?}, over {limit:?}")
            }
        }
    }
}

/// Why a server did not start.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServerError {
    /// More connections are asked for than descriptors allow, or zero.
    ConnectionLimit {
        /// The connections asked for.
        asked: usize,
        /// The most that are possible now.
        allowed: usize,
        /// The process's limit on open descriptors.
        descriptors: u64,
    },
    /// The server cannot listen on the address.
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The socket that [`ServerBuilder::adopt`] was given does not listen.
    NotListening,
    /// The worker pool did not start.
    Pool(PoolError),
    /// The system refused to start the reactor's thread.
    Thread(io::Error),
    /// The system refused another resource that a server needs.
    Setup(io::Error),
    /// The registry did not take the metrics, which it may have already.
    Registry(prometheus::Error),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerError::ConnectionLimit { asked: 0, descriptors, .. } => {
                write!(f, "no room for a connection within the limit of {descriptors} open files")
            }
            ServerError::ConnectionLimit { asked, allowed, descriptors } => write!(
                f,
                "{asked} connections asked for, and {allowed} possible within the limit of {descriptors} open files"
            ),
            ServerError::Bind { address, .. } => write!(f, "cannot listen on {address}"),
            ServerError::NotListening => f.write_str("the socket does not listen"),
            ServerError::Pool(_) => f.write_str("the worker pool did not start"),
            ServerError::Thread(_) => f.write_str("the system refused the reactor's thread"),
            ServerError::Setup(_) => f.write_str("the system refused what a server needs"),
            ServerError::Registry(_) => f.write_str("the registry did not take the metrics"),
        }
    }
}

impl std::error::Error for ServerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ServerError::ConnectionLimit { .. } | ServerError::NotListening => None,
            ServerError::Bind { source, .. } | ServerError::Thread(source) | ServerError::Setup(source) => {
                Some(source)
            }
            ServerError::Pool(source) => Some(source),
            ServerError::Registry(source) => Some(source),
        }
    }
}

/// What keeps new connections out. The reactor publishes it in [`Core::strain`].
const AT_EASE: u8 = 0;
const FULL: u8 = 1;
const STARVED: u8 = 2;

/// A message to the reactor about a connection, which its slot and its serial number name.
#[derive(Clone, Copy, Debug)]
enum Note {
    /// From a worker: the socket is closed, and the slot is free.
    Closed(usize, u64),
    /// From a worker: the connection is half-closed. The reactor waits for its output and for the client's end.
    Linger(usize, u64),
    /// From a worker: the kernel had no memory for output. The reactor has the worker's try repeated.
    Retry(usize, u64),
    /// From the thread that drops sessions: one is dropped.
    Dropped,
}

/// The state that the reactor, the workers and the handles of one server share.
#[derive(Debug)]
struct Core {
    clock: Clock,
    /// When the clock was started, as time since 1970.
    started: Duration,
    lifecycle: Arc<Lifecycle>,
    ledger: Ledger,
    max_connections: usize,
    /// The listen queue's limit when the server was bound; `None` if the kernel does not tell.
    backlog: Option<u32>,
    limits: Limits,
    /// The keepalive time to set on each accepted socket; `None` if the socket inherits one, or gets none.
    keepalive_on_accept: Option<Duration>,
    overload: Overload,
    waker: mio::Waker,
    /// To the reactor. It has no bound of its own and needs none. A connection sends one note a turn, and is queued
    /// again only by the reactor, which reads all notes first; its slot is not used again before that.
    notes: Sender<Note>,
    /// The reactor sleeps, and any note must wake it. Written by the reactor, read by workers; see [`Core::notify`].
    wants_notes: AtomicBool,
    /// `AT_EASE`, `FULL` or `STARVED`. Written by the reactor, read by handles.
    strain: AtomicU8,
    /// When the reactor last looked for events. Written by the reactor, read by handles.
    heartbeat_ns: AtomicU64,
    buffers: Buffers,
    panic_log: LogLimit,
}

impl Core {
    /// Closes a connection and counts it in `cell`, which belongs to the calling thread. Only for the holder
    /// of the gate. Returns the session, whose destructor is the service's code and may block or panic.
    fn close<Session>(
        &self,
        connection: &Connection<Session>,
        reason: Reason,
        cell: &Cell,
        now_ns: u64,
    ) -> Option<Session> {
        let session = {
            let mut held = connection.hold();
            if reason == Reason::WriteTimeout || reason == Reason::Aborted && held.owes() {
                held.reset_at_close();
            }
            held.close()
        };
        if session.is_some() {
            let lived_ns = now_ns.saturating_sub(connection.accepted_ns);
            cell.closed(reason, lived_ns);
            let lived = Duration::from_nanos(lived_ns);
            tracing::debug!(peer = %connection.peer, reason = reason.as_str(), ?lived, "closed");
        }
        connection.gate.finish();
        session
    }

    /// Sends the reactor a note, and wakes it if it has to act on the note. A note on a connection to linger on or to
    /// try again always wakes it. Other notes wake it when it waits for room, or for the last connection of a drain.
    /// Otherwise it reads them whenever it next comes round.
    ///
    /// The note is sent before the flag is read, and the reactor raises the flag before it looks for notes a
    /// last time and sleeps. With the fences, one of the two sees the other.
    fn notify(&self, note: Note) {
        // The reactor lives as long as the server. When it is gone, so are the connections.
        let _ = self.notes.send(note);
        fence(Ordering::SeqCst);
        let urgent = matches!(note, Note::Linger(..) | Note::Retry(..));
        if urgent || self.wants_notes.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    fn wake(&self) {
        // It fails only if the counter of the eventfd is full, and then the reactor is being woken already.
        let _ = self.waker.wake();
    }
}
