//! `cargo run --example faulty` serves an echo with a bug: a message that begins with `panic` makes its job panic.
//!
//! The checks of the dashboard need one, because the echo server has no message that makes it fail. It says where it
//! listens as `millpond` does, and Ctrl-C drains it.

use std::net::SocketAddr;

use millpond::{Echo, Exposition, Next, Server, Service};
use prometheus::process_collector::ProcessCollector;
use prometheus::{Gauge, Opts, Registry};

/// What a message begins with to make its job panic.
const MARKER: &[u8] = b"panic";

struct Faulty;

impl Service for Faulty {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, session: &mut (), bytes: &mut Vec<u8>) -> Next {
        assert!(!bytes.starts_with(MARKER), "a message began with the marker");
        Echo.serve(session, bytes)
    }
}

/// The metric by which dashboards and alerts know an instance; `millpond` exports its own.
fn build_info() -> prometheus::Result<Gauge> {
    let options = Opts::new("millpond_build_info", "1, labelled with what was built.");
    let gauge = Gauge::with_opts(options.const_label("version", "faulty").const_label("revision", "test"))?;
    gauge.set(1.0);
    Ok(gauge)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let any_port: SocketAddr = ([127, 0, 0, 1], 0).into();
    let running = Server::builder("echo").service(Faulty).workers(2).bind(any_port)?.start()?;
    let registry = Registry::new();
    running.register(&registry)?;
    registry.register(Box::new(build_info()?))?;
    registry.register(Box::new(ProcessCollector::for_self()))?;
    let exposition = Exposition::serve(registry, any_port)?;
    let handle = running.handle();
    ctrlc::set_handler(move || handle.drain())?;
    println!("faulty: echo on {}", running.local_addr());
    println!("faulty: metrics on http://{}/metrics", exposition.local_addr());
    println!("{}", running.wait().ok_or("the server failed")?);
    exposition.stop();
    Ok(())
}
