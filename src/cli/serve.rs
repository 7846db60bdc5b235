//! `millpond serve`: starts the server, waits for a signal, drains, and exits with a code that says how it ended.
//!
//! The start raises the descriptor limit, checks the memory limit, and takes over or binds both listeners. Threads
//! start only after that, so every error up to there is reported before anything runs. At the end the echo server
//! drains, the metrics answer until the drain is over, and the report is the last line of the log. The service manager,
//! if there is one, gets a message at each step.
//!
//! The first signal begins the drain. Signals within [`ONE_STOP`] of it belong to the same stop, and a later one ends
//! the program at once: [`signals`] says why. The crate that catches signals replaces an inherited "ignore". So a
//! server that a script starts with `&` still drains on SIGINT, and a server under `nohup` drains on SIGHUP. Use
//! `setsid` or a service manager to outlive a terminal.

use std::io::{self, Write};
use std::process::ExitCode;

use crossbeam_channel::{Receiver, select};
use millpond::{
    BoundExposition, Echo, Exposition, Laboured, PoolError, Report, Server, ServerError,
    raise_descriptor_limit,
};
use prometheus::process_collector::ProcessCollector;
use prometheus::{Gauge, Opts, Registry};
use tracing::{debug, info, warn};

use super::config::Config;
use super::manager::{Listeners, Manager, REMEDY as PASS_ON};
use super::signals::{self, Notice, ONE_STOP};
use super::{ABANDONED, CUT, FAILED, chain, fail, logging, memory};

/// Descriptors that the server frees when none are left. They are one for each connection of the metrics endpoint, and
/// as many again for the files that a scrape reads.
const SPARE_DESCRIPTORS: usize = 32;

/// Runs the server until it has drained.
pub(crate) fn run(config: &Config) -> ExitCode {
    let limit = match raise_descriptor_limit() {
        Ok(limit) => limit,
        Err(error) => {
            return fail(FAILED, format_args!("the limit on open files cannot be raised: {error}"));
        }
    };
    if let Err(why) = memory::suffices(config.workers, config.stack_size) {
        return fail(FAILED, why);
    }
    let mut builder = Server::builder("echo")
        .service(Laboured::new(Echo, config.work))
        .workers(config.workers)
        .stack_size(config.stack_size)
        .spare_descriptors(SPARE_DESCRIPTORS)
        .overload(config.overload.into())
        .backlog(u32::try_from(config.backlog).unwrap_or(u32::MAX))
        .idle_timeout(Some(config.idle_timeout).filter(|timeout| !timeout.is_zero()))
        .keepalive(Some(config.keepalive).filter(|time| !time.is_zero()))
        .write_timeout(config.write_timeout)
        .lame_duck(config.lame_duck)
        .drain_timeout(config.drain_timeout);
    if let Some(connections) = config.max_connections {
        builder = builder.max_connections(connections);
    }
    if let Some(wait) = config.max_queue_wait {
        builder = builder.max_queue_wait(wait);
    }
    let listeners = match Listeners::take() {
        Ok(listeners) => listeners,
        Err(why) => return fail(FAILED, why),
    };
    let passed_on = (listeners.echo.is_some(), listeners.metrics.is_some());
    let server = match listeners.echo {
        Some(listener) => builder.adopt(listener),
        None => builder.bind(config.listen),
    };
    let server = match server {
        Ok(server) => server,
        Err(error) => return fail(FAILED, explain(&error, "--listen")),
    };
    let registry = Registry::new();
    let exposition = match listeners.metrics {
        Some(listener) => Exposition::adopt(registry.clone(), listener),
        None => Exposition::bind(registry.clone(), config.metrics),
    };
    let exposition = match exposition {
        Ok(exposition) => exposition,
        Err(error) => return fail(FAILED, explain(&error, "--metrics")),
    };
    let (max_connections, backlog) = (server.max_connections(), server.backlog());

    let Some(log) = logging::start(config) else {
        return fail(FAILED, refused_thread("the log", "no thread is available"));
    };
    let notices = match signals::notices() {
        Ok(notices) => notices,
        // The thread is the only thing that the system can refuse here. The crate does not pass on the system's error.
        Err(ctrlc::Error::System(_)) => {
            return fail(FAILED, refused_thread("signals", "no thread is available"));
        }
        Err(error) => return fail(FAILED, format_args!("signals cannot be caught: {error}")),
    };

    let running = match server.start() {
        Ok(running) => running,
        Err(error) => return fail(FAILED, explain(&error, "--workers")),
    };
    register(&registry, &running);
    let (health, readiness) = (running.handle(), running.handle());
    let exposition = exposition
        .probe("/healthz", move || {
            health.health().map_err(|since| format!("the reactor has not come round for {since:.1?}"))
        })
        .probe("/readyz", move || readiness.readiness().map_err(|reason| reason.to_string()))
        .status(running.handle());
    let exposition = config.status_host.iter().fold(exposition, BoundExposition::status_host);
    let exposition = match exposition.start() {
        Ok(exposition) => exposition,
        Err(error) => return fail(FAILED, explain(&error, "--metrics")),
    };
    let (echo, metrics) = (running.local_addr(), exposition.local_addr());
    announce(echo, metrics);
    for (flag, address, passed_on) in [("--listen", echo, passed_on.0), ("--metrics", metrics, passed_on.1)] {
        if passed_on {
            info!(%address, "listening on the service manager's socket, not on the address of {flag}");
        }
    }
    if let Some(kept) = backlog.filter(|_| !passed_on.0) {
        warn_if_cut(config.backlog, kept);
    }
    info!(workers = config.workers, max_connections, backlog, open_files = limit, "serving");
    let mut manager = Manager::from_env();
    manager.ready(&format!("serving on {echo}, metrics on http://{metrics}/metrics"));

    let outcome = wait(config, &notices, &running, &mut manager);
    let code = match outcome {
        Outcome::Abandoned => {
            warn!("another signal: abandoned at once, with all connections");
            ExitCode::from(ABANDONED)
        }
        Outcome::Broken => {
            exposition.stop();
            tracing::error!("the reactor failed, and nothing is served any more");
            ExitCode::from(FAILED)
        }
        Outcome::Drained(report) => {
            exposition.stop();
            manager.ended(&report.to_string());
            if report.is_clean() {
                info!("{report}");
                ExitCode::SUCCESS
            } else {
                warn!("{report}");
                ExitCode::from(CUT)
            }
        }
    };
    drop(log);
    code
}

/// How the wait ended.
enum Outcome {
    Drained(Report),
    Abandoned,
    Broken,
}

/// Waits for the end: of the drain, which the first signal begins, or of everything, which a later signal abandons.
fn wait(
    config: &Config,
    notices: &Receiver<Notice>,
    running: &millpond::Running,
    manager: &mut Manager,
) -> Outcome {
    let feeding = manager.feeding();
    loop {
        select! {
            recv(notices) -> notice => match notice {
                Ok(Notice::Stop) => {
                    info!(
                        lame_duck = ?config.lame_duck,
                        timeout = ?config.drain_timeout,
                        "signal: draining; another signal abandons at once if it comes {ONE_STOP:?} or more after this one"
                    );
                    running.handle().drain();
                    manager.stopping(config.lame_duck + config.drain_timeout);
                }
                Ok(Notice::Repeat { after }) => {
                    debug!(?after, "another signal: it belongs to the same stop, and the drain goes on");
                }
                // If the signal crate's thread is gone, no signal can stop the server any more.
                Ok(Notice::Abandon) | Err(_) => return Outcome::Abandoned,
            },
            recv(feeding) -> _ => manager.feed(&running.handle()),
            recv(running.finished()) -> report => {
                return report.map_or(Outcome::Broken, Outcome::Drained);
            }
        }
    }
}

/// Registers every exported metric.
fn register(registry: &Registry, running: &millpond::Running) {
    const FRESH: &str = "the registry is new, and each is registered once";
    running.register(registry).expect(FRESH);
    let build_info = Gauge::with_opts(
        Opts::new("millpond_build_info", "1, labelled with the version and the revision it was built from. Several values among instances mean a rollout, or one that stopped half way.")
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label("revision", env!("MILLPOND_REVISION")),
    )
    .expect("literal names are valid");
    build_info.set(1.0);
    registry.register(Box::new(build_info)).expect(FRESH);
    registry.register(Box::new(ProcessCollector::for_self())).expect(FRESH);
}

/// Prints one line for each listener, for scripts. A closed standard output does not stop the server.
fn announce(echo: std::net::SocketAddr, metrics: std::net::SocketAddr) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "millpond: echo on {echo}\nmillpond: metrics on http://{metrics}/metrics");
    let _ = stdout.flush();
}

/// Warns when the kernel keeps fewer connections in the listen queue than asked for, which it does not report. The side
/// HTTP endpoint serves 16 connections at a time, so the length of its own queue is not worth a warning.
fn warn_if_cut(asked: usize, kept: u32) {
    if usize::try_from(kept).is_ok_and(|kept| kept < asked) {
        warn!(
            "--backlog {asked}: the kernel keeps {kept} at most (net.core.somaxconn); raise that with \
             sysctl -w net.core.somaxconn={asked} and start again, or ask for less"
        );
    }
}

/// The text of an error at the start, which names the flag to change and the remedy.
fn explain(error: &ServerError, flag: &str) -> String {
    let line = chain(error);
    match error {
        ServerError::Bind { address, source } => {
            let remedy = match source.kind() {
                io::ErrorKind::AddrInUse => {
                    "stop the program that listens there, or give another port (0 picks a free one)"
                }
                io::ErrorKind::AddrNotAvailable => "give an address of this machine",
                io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; give a higher one",
                _ => "give another address",
            };
            format!("{flag} {address}: cannot listen there: {source}; {remedy}")
        }
        ServerError::NotListening => format!("the socket passed on in place of {flag}: {line}; {PASS_ON}"),
        ServerError::ConnectionLimit { asked: 0, .. } => {
            format!("--max-connections: {line}; raise the limit (ulimit -n)")
        }
        ServerError::ConnectionLimit { allowed, .. } => {
            format!("--max-connections: {line}; give at most {allowed}, or raise the limit (ulimit -n)")
        }
        // The side HTTP endpoint needs few threads, and no flag sets their number. The workers take all there are.
        ServerError::Pool(PoolError::Spawn { source, .. }) | ServerError::Thread(source)
            if flag == "--metrics" =>
        {
            refused_thread("the side HTTP endpoint", source)
        }
        ServerError::Pool(PoolError::Spawn { started, .. }) => {
            let fewer = if *started > 0 { format!("at most {started}, ") } else { String::new() };
            format!("--workers: {line}; give {fewer}a smaller --stack-size, or raise {THREAD_LIMITS}")
        }
        ServerError::Thread(source) => refused_thread("the reactor", source),
        _ => line,
    }
}

/// The limits that keep threads from starting.
const THREAD_LIMITS: &str = "the limits on threads and memory (ulimit -u, ulimit -v)";

/// The text for a thread that the system refused, with the remedy: fewer workers, as they are nearly all threads.
fn refused_thread(whose: &str, why: impl std::fmt::Display) -> String {
    format!(
        "--workers: the system refused the thread of {whose}: {why}; give fewer, a smaller --stack-size, or raise \
         {THREAD_LIMITS}"
    )
}
