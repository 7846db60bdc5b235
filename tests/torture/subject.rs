//! The server of a round: the program, or the library in this process.

use std::net::SocketAddr;
use std::time::Duration;

use millpond::prometheus::Registry;
use millpond::{Echo, Exposition, Laboured, Overload, Running, Server};
use rustix::process::Signal;

use super::common::Millpond;
use super::common::report::{Report, report};
use super::common::scrape::Scrape;
use super::plan::Settings;

pub(crate) trait Subject: Send + Sync {
    fn start(settings: &Settings) -> Self;
    fn echo(&self) -> SocketAddr;
    fn metrics(&self) -> SocketAddr;
    /// Begins the drain, by the signal of this number where there are signals.
    fn signal(&self, number: usize);
    /// Waits for the end of the drain.
    fn ended(&mut self) -> Ended;
    /// Lets go of what is left of it.
    fn close(self);
}

/// How a server ended.
pub(crate) struct Ended {
    pub(crate) report: Report,
    pub(crate) code: Option<i32>,
    pub(crate) last: Option<Scrape>,
}

/// `millpond` as a process, with signals and an exit code.
pub(crate) struct Program(Millpond);

impl Subject for Program {
    fn start(settings: &Settings) -> Self {
        let duration = |time: Duration| format!("{}us", time.as_micros());
        let mut flags = vec![
            "--workers".to_owned(),
            settings.workers.to_string(),
            "--work".to_owned(),
            duration(settings.work),
            "--overload".to_owned(),
            if settings.reject { "reject" } else { "wait" }.to_owned(),
            "--idle-timeout".to_owned(),
            duration(settings.idle_timeout),
            "--write-timeout".to_owned(),
            duration(settings.write_timeout),
            "--lame-duck".to_owned(),
            duration(settings.lame_duck),
            "--drain-timeout".to_owned(),
            duration(settings.drain_timeout),
        ];
        if let Some(connections) = settings.max_connections {
            flags.extend(["--max-connections".to_owned(), connections.to_string()]);
        }
        if let Some(wait) = settings.max_queue_wait {
            flags.extend(["--max-queue-wait".to_owned(), duration(wait)]);
        }
        Program(Millpond::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    fn echo(&self) -> SocketAddr {
        self.0.echo
    }

    fn metrics(&self) -> SocketAddr {
        self.0.metrics
    }

    fn signal(&self, number: usize) {
        self.0.signal([Signal::INT, Signal::TERM, Signal::HUP][number]);
    }

    fn ended(&mut self) -> Ended {
        let code = self.0.wait().code();
        assert!(matches!(code, Some(0 | 3)), "exit code {code:?}: {}", self.0.log());
        Ended { report: report(&self.0), code, last: None }
    }

    fn close(self) {}
}

/// A server of the library, with its metrics.
pub(crate) struct Inside {
    running: Running,
    exposition: Exposition,
}

impl Subject for Inside {
    fn start(settings: &Settings) -> Self {
        let any_port = ([127, 0, 0, 1], 0).into();
        let mut builder = Server::builder("echo")
            .service(Laboured::new(Echo, settings.work))
            .workers(settings.workers)
            .overload(if settings.reject { Overload::Reject } else { Overload::Wait })
            .idle_timeout(Some(settings.idle_timeout))
            .write_timeout(settings.write_timeout)
            .lame_duck(settings.lame_duck)
            .drain_timeout(settings.drain_timeout);
        if let Some(connections) = settings.max_connections {
            builder = builder.max_connections(connections);
        }
        if let Some(wait) = settings.max_queue_wait {
            builder = builder.max_queue_wait(wait);
        }
        let running = builder.bind(any_port).expect("a port").start().expect("it starts");
        let registry = Registry::new();
        running.register(&registry).expect("a new registry");
        let exposition = Exposition::serve(registry, any_port).expect("it starts");
        Inside { running, exposition }
    }

    fn echo(&self) -> SocketAddr {
        self.running.local_addr()
    }

    fn metrics(&self) -> SocketAddr {
        self.exposition.local_addr()
    }

    fn signal(&self, _: usize) {
        self.running.handle().drain();
    }

    fn ended(&mut self) -> Ended {
        let report = self.running.finished().recv().expect("the reactor ran to its end");
        Ended { report: report.into(), code: None, last: Some(Scrape::of(self.metrics())) }
    }

    fn close(self) {
        self.exposition.stop();
    }
}
