//! Clients and networks that break in every way, and a system without disk space, output, or a reader of the output.
//! Each may harm itself, and no other client. After each fault the numbers balance and nothing is left over. The server
//! then serves others, and its drain is clean.
//!
//! The random choices come from a seed; `common::proxy` says how to repeat them.

mod common;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use common::clients::Load;
use common::proxy::{Plan, Proxy, Seed, Way};
use common::scrape::{Guard, Scrape};
use common::victim::Victim;
use common::{PATIENCE, connect, eventually, http, ping};
use rustix::process::{Pid, Signal, kill_process};

const KIB: usize = 1024;

/// Closes a connection so that the kernel sends a reset.
fn reset(stream: TcpStream) {
    socket2::Socket::from(stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
}

/// Bytes without a long repetition.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 ^ (at / 251) as u8).collect()
}

#[test]
fn a_message_of_every_size_comes_back_whole() {
    let victim = Victim::start(&["--workers", "2"]);
    let mut client = victim.server.connect();
    client.set_nodelay(true).expect("a socket option");
    // Also sizes around that of the server's buffer, and around twice that.
    let around = |size: usize| size - 3..=size + 3;
    let sizes = (1..=2048).chain(around(4 * KIB)).chain(around(64 * KIB)).chain(around(128 * KIB));
    let message = pattern(129 * KIB);
    let mut sent = 0;
    for size in sizes {
        ping(&mut client, &message[..size]);
        sent += size;
    }
    drop(client);
    let scrape = victim.unharmed();
    assert_eq!(scrape.get("received_bytes_total"), sent as f64);
    assert_eq!(scrape.get("sent_bytes_total"), sent as f64);
}

#[test]
fn pieces_of_every_size_both_ways_lose_nothing() {
    const CLIENTS: usize = 24;
    const BYTES: usize = 256 * KIB;
    let (seed, victim) = (Seed::new(), Victim::start(&["--workers", "3"]));
    let proxy = Proxy::to(victim.server.echo, &seed, |_, random| {
        let most = 1 << random.u32(10..=17);
        Plan { to_server: Way::cut_into(1..=most), to_client: Way::cut_into(1..=128 * KIB) }
    });
    let guard = Guard::over(victim.server.metrics);
    let seed_of_load = seed.for_use(u64::MAX).u64(..);
    let load = Load {
        address: proxy.address,
        clients: CLIENTS,
        bytes: BYTES,
        message: 1..=200 * KIB,
        seed: seed_of_load,
    };
    load.run().expect("every byte of every client comes back");
    guard.finish();
    let done = eventually("all have left", || Some(proxy.done()).filter(|done| done.over == CLIENTS));
    assert_eq!(done.resets, 0, "{done:?}");
    let all = CLIENTS * BYTES;
    assert_eq!((done.bytes_to_server, done.bytes_to_client), (all, all));
    assert!(done.pieces_to_server > 10 * CLIENTS, "{done:?}");
    let scrape = victim.unharmed();
    assert_eq!(scrape.get("received_bytes_total"), all as f64);
    assert_eq!(scrape.get("sent_bytes_total"), all as f64);
    assert_eq!(scrape.closed("client"), CLIENTS as f64);
}

#[test]
fn one_byte_drips_hold_no_worker() {
    const CLIENTS: usize = 20;
    const BYTES: usize = 1500;
    let (seed, victim) = (Seed::new(), Victim::start(&["--workers", "1"]));
    let proxy = Proxy::to(victim.server.echo, &seed, |_, _| Plan::cut_into(1..=1));
    let (address, seed_of_load) = (proxy.address, seed.for_use(u64::MAX).u64(..));
    let dripping = thread::spawn(move || {
        Load { address, clients: CLIENTS, bytes: BYTES, message: 1..=300, seed: seed_of_load }.run()
    });
    let mut other = victim.server.connect();
    let (mut pings, mut message) = (0, pattern(2000));
    while !dripping.is_finished() {
        ping(&mut other, &message);
        message.rotate_left(1);
        pings += 1;
    }
    dripping.join().expect("the clients").expect("every byte of every client comes back");
    assert!(pings > 10, "the other client had only {pings} answers meanwhile");
    drop(other);
    let done = eventually("all have left", || Some(proxy.done()).filter(|done| done.over == CLIENTS));
    assert_eq!(done.pieces_to_server, CLIENTS * BYTES, "each byte came alone");
    assert_eq!(victim.unharmed().get("sent_bytes_total"), (CLIENTS * BYTES + pings * 2000) as f64);
}

/// Sends as much as possible. Returns the bytes that came back before the end or a reset, one of which must come.
fn converse(address: SocketAddr, message: &[u8]) -> Vec<u8> {
    // A reset may arrive before `connect` returns.
    let Ok(mut stream) = TcpStream::connect(address) else { return Vec::new() };
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut writer = stream.try_clone().expect("a clone");
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(message));
        let mut answer = Vec::new();
        let mut buffer = vec![0; 64 * KIB];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return answer,
                Ok(received) => answer.extend_from_slice(&buffer[..received]),
                Err(error) => {
                    assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "neither an end nor a reset");
                    return answer;
                }
            }
        }
    })
}

#[test]
fn a_reset_after_any_number_of_bytes_harms_only_its_own() {
    const SMALL: usize = 80;
    const LARGE: usize = 60;
    const EACH: usize = SMALL + LARGE;
    let (seed, victim) = (Seed::new(), Victim::start(&["--workers", "2"]));
    // The first half is reset on the way to the server, and the second half on the way back. Each half begins with a
    // reset after every small number of bytes, and goes on with large numbers.
    let proxy = Proxy::to(victim.server.echo, &seed, |number, random| {
        let after = if number % EACH < SMALL { number % EACH } else { random.usize(SMALL..300 * KIB) };
        let mut plan = Plan::cut_into(1..=64 * KIB);
        let way = if number < EACH { &mut plan.to_server } else { &mut plan.to_client };
        way.reset_after = Some(after);
        plan
    });
    let guard = Guard::over(victim.server.metrics);
    let (message, mut bystander) = (pattern(400 * KIB), victim.server.connect());
    for number in 0..2 * EACH {
        let answer = converse(proxy.address, &message);
        assert!(message.starts_with(&answer), "number {number}: not what was sent");
        ping(&mut bystander, b"unharmed");
    }
    guard.finish();
    let done = proxy.done();
    assert_eq!((done.connections, done.over, done.resets), (2 * EACH, 2 * EACH, 2 * EACH));
    drop(bystander);
    let scrape = victim.unharmed();
    assert_eq!(scrape.get("connections_accepted_total"), (2 * EACH + 1) as f64);
    assert_eq!(scrape.closed("error"), (2 * EACH) as f64, "each reset is counted as one");
}

#[test]
fn a_client_that_half_closes_after_any_number_of_bytes_gets_them_all_back() {
    const SMALL: usize = 100;
    let (seed, victim) = (Seed::new(), Victim::start(&["--workers", "2"]));
    let proxy = Proxy::to(victim.server.echo, &seed, |number, random| {
        let most = if number < SMALL { 1 << random.u32(0..=6) } else { 1 << random.u32(8..=16) };
        Plan::cut_into(1..=most)
    });
    let (message, mut random) = (pattern(200 * KIB), seed.for_use(u64::MAX));
    let large = std::iter::repeat_with(|| random.usize(SMALL..200 * KIB)).take(30);
    let sizes: Vec<usize> = (0..SMALL).chain(large).collect();
    for &size in &sizes {
        let mut stream = connect(proxy.address);
        let mut writer = stream.try_clone().expect("a clone");
        thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&message[..size]).expect("it is taken");
                writer.shutdown(Shutdown::Write).expect("a shutdown");
            });
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("the end, and no reset");
            assert!(answer == message[..size], "{} of {size} bytes", answer.len());
        });
    }
    let scrape = victim.unharmed();
    let all: usize = sizes.iter().sum();
    assert_eq!(scrape.get("received_bytes_total"), all as f64);
    assert_eq!(scrape.get("sent_bytes_total"), all as f64);
    assert_eq!(scrape.closed("client"), sizes.len() as f64);
}

#[test]
fn who_resets_before_being_accepted_keeps_nobody_waiting() {
    const GONE: usize = 200;
    let victim = Victim::start(&["--max-connections", "1", "--workers", "2"]);
    let mut inside = victim.server.connect();
    ping(&mut inside, b"in");
    for number in 0..GONE {
        let mut stream = victim.server.connect();
        if number % 2 == 0 {
            stream.write_all(b"gone before it is read").expect("the kernel takes it");
        }
        reset(stream);
    }
    let mut behind = victim.server.connect();
    behind.write_all(b"still here").expect("the kernel takes it");
    assert_eq!(victim.server.scrape().get("connections_accepted_total"), 1.0);
    drop(inside);
    behind.read_exact(&mut [0; 10]).expect("served after the reset connections");
    drop(behind);
    let scrape = victim.unharmed();
    let vanished = scrape.get("accept_errors_total{kind=\"aborted\"}");
    assert_eq!(scrape.closed("error") + vanished, GONE as f64, "each is counted");
    assert_eq!(scrape.closed("client"), 2.0);
}

/// millpond as a child whose standard output is not read. Killed when dropped.
struct Mute {
    child: Child,
    echo: SocketAddr,
    metrics: SocketAddr,
}

impl Mute {
    /// Starts the program with its streams redirected as in a shell.
    fn start(redirections: &str) -> Self {
        let script = format!("exec \"$0\" -v --listen 127.0.0.1:0 --metrics 127.0.0.1:0 {redirections}");
        let mut command = Command::new("sh");
        Self::spawn(command.args(["-c", &script, env!("CARGO_BIN_EXE_millpond")]))
    }

    fn spawn(command: &mut Command) -> Self {
        // The child has an owner from the start. So it is killed also if it never listens.
        let nowhere = SocketAddr::from(([0; 4], 0));
        let mut server = Mute { child: command.spawn().expect("a shell"), echo: nowhere, metrics: nowhere };
        [server.echo, server.metrics] = eventually("it listens", || {
            assert!(server.child.try_wait().expect("a child").is_none(), "it ended");
            <[SocketAddr; 2]>::try_from(listening(server.child.id())).ok()
        });
        server
    }

    /// Asserts that the program serves, that its numbers balance, and that it drains clean.
    fn serves(mut self) {
        const CLIENTS: usize = 300;
        let answer = |path: &str| http(self.metrics, format!("GET {path} HTTP/1.1\r\n\r\n"));
        for _ in 0..CLIENTS {
            ping(&mut connect(self.echo), b"hello");
        }
        let scrape =
            Scrape::after(self.metrics, "all have left", |now| now.closed("client") == CLIENTS as f64);
        assert_eq!(scrape.get("sent_bytes_total"), (CLIENTS * 5) as f64);
        assert_eq!((answer("/healthz").code, answer("/readyz").code), (200, 200));
        let mut silent = connect(self.echo);
        ping(&mut silent, b"here");
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("the process is there");
        assert_eq!(silent.read(&mut [0]).expect("the end, and no reset"), 0);
        drop(silent);
        let status = eventually("it exits", || self.child.try_wait().expect("a child"));
        assert_eq!(status.code(), Some(0));
    }

    /// Returns the file to which one of the program's descriptors refers.
    fn descriptor(&self, number: u32) -> String {
        let link = std::fs::read_link(format!("/proc/{}/fd/{number}", self.child.id()));
        link.expect("it is open").to_string_lossy().into_owned()
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The addresses on which a process listens, in the order in which it began to listen.
fn listening(pid: u32) -> Vec<SocketAddr> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    // "0: 0100007F:3A98 00000000:0000 0A ... inode": an address is in the machine's byte order, 0A is listening.
    let listeners = table.lines().filter(|line| line.contains(" 00000000:0000 0A "));
    let listeners: Vec<(&str, SocketAddr)> = listeners
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = fields.get(1)?.split_once(':')?;
            let address = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
            let port = u16::from_str_radix(port, 16).ok()?;
            Some((*fields.get(9)?, SocketAddr::from((address, port))))
        })
        .collect();
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let mut sockets: Vec<(u32, String)> = descriptors
        .flatten()
        .filter_map(|entry| {
            let link = std::fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
            let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
            Some((entry.file_name().to_str()?.parse().ok()?, inode))
        })
        .collect();
    sockets.sort_unstable();
    let of = |inode: &str| listeners.iter().find(|(listener, _)| *listener == inode).map(|found| found.1);
    let mut found: Vec<SocketAddr> = sockets.iter().filter_map(|(_, inode)| of(inode)).collect();
    // The spare descriptors are copies of the first.
    found.dedup();
    found
}

#[test]
fn a_full_disk_under_the_log_stops_nothing() {
    Mute::start("2>/dev/full").serves();
    Mute::start(">/dev/full 2>/dev/full").serves();
}

/// If a socket got the number of a closed stream, all output to that stream would go to the socket.
#[test]
fn closed_streams_are_never_a_clients_socket() {
    for closed in ["1>&- 2>&-", "<&- >&- 2>&-"] {
        let server = Mute::start(closed);
        let streams = if closed.starts_with('<') { 0..=2 } else { 1..=2 };
        for number in streams {
            assert_eq!(server.descriptor(number), "/dev/null", "{closed}");
        }
        server.serves();
    }
}

#[test]
fn a_log_whose_reader_goes_away_stops_nothing() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
    command.args(["-v", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = Mute::spawn(&mut command);
    drop((server.child.stdout.take(), server.child.stderr.take()));
    server.serves();
}
