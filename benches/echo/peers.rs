//! Echo servers to compare with, each the shortest that does the job: what a programmer would write without a pool.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use millpond::{Echo, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// As many bytes as millpond reads at a time.
const READ_SIZE: usize = 64 * 1024;

/// Serves for ever as the peer of this name.
pub(crate) fn serve(name: &str) {
    match name {
        "tokio" => tokio_tasks(),
        "threads" => threads(),
        "untimed" => untimed(),
        other => panic!("there is no peer {other}"),
    }
}

fn announce(address: std::net::SocketAddr) {
    println!("echo on {address}");
}

/// A task for each connection, on a thread for each processor.
fn tokio_tasks() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_io().build().expect("a runtime");
    runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
        let listener = socket.listen(4096).expect("it listens");
        announce(listener.local_addr().expect("an address"));
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { continue };
            tokio::spawn(async move {
                let _ = stream.set_nodelay(true);
                let mut buffer = vec![0; READ_SIZE];
                while let Ok(received @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..received]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// A thread for each connection.
fn threads() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    announce(listener.local_addr().expect("an address"));
    for stream in listener.incoming().flatten() {
        let mut stream = stream;
        let conversation = move || {
            let _ = stream.set_nodelay(true);
            let mut buffer = vec![0; READ_SIZE];
            while let Ok(received @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..received]).is_err() {
                    break;
                }
            }
        };
        let started = thread::Builder::new().stack_size(256 * 1024).spawn(conversation);
        drop(started.expect("a thread"));
    }
}

/// Millpond's server without a look at the clock, and so without timeouts: what measuring costs.
fn untimed() {
    let server = Server::builder("echo").service(Echo).timed(false).idle_timeout(None);
    let running = server.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
    announce(running.local_addr());
    let _ = running.wait();
}
