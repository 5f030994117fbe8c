//! A TCP proxy between any two parts that shows the faults of a network: connections that are cut or refused, bytes
//! that come late, slowly, or in one direction only.
//!
//! It forwards bytes and knows no protocol. A stopped direction behaves as a network that loses every packet: nothing
//! arrives while it is stopped, and what was sent arrives when it is lifted, as TCP sends it again.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 16 << 10;
/// Chunks on their way in one direction: 1 MiB at most, which stands for the buffers of a network. Beyond it the
/// sender has to wait.
const CHUNKS_MAX: usize = 64;
/// Connections at once; more are a mistake of the test, and are refused.
const CONNECTIONS_MAX: usize = 1024;
/// A throttled direction is written in slices of this length, so that a change shows soon.
const SLICE: Duration = Duration::from_millis(20);

/// What happens to the bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// How long after it was sent each byte arrives.
    pub delay: Duration,
    /// Whether nothing arrives at all.
    pub stopped: bool,
    /// How many bytes arrive a second, for each connection.
    pub bytes_per_s: Option<u64>,
    /// With how many bytes that have arrived a connection breaks: nothing larger gets through.
    pub breaks_after: Option<u64>,
}

/// What the network does. The default is to do its work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Whether new connections are closed at once.
    pub refusing: bool,
    /// From those who connected to where they wanted.
    pub to_target: Direction,
    /// And back.
    pub to_client: Direction,
}

impl Direction {
    const STOPPED: Self = Self {
        delay: Duration::ZERO,
        stopped: true,
        bytes_per_s: None,
        breaks_after: None,
    };
}

impl Network {
    /// Nobody hears anybody: connections stay, and are silent.
    pub fn partitioned() -> Self {
        Self::of_both(Direction::STOPPED)
    }

    /// Nothing arrives where one connected to, and what comes from there does.
    pub fn mute() -> Self {
        Self {
            to_target: Direction::STOPPED,
            ..Self::default()
        }
    }

    /// Everything arrives where one connected to, and nothing comes back.
    pub fn deaf() -> Self {
        Self {
            to_client: Direction::STOPPED,
            ..Self::default()
        }
    }

    /// New connections are closed at once. Those that are open stay.
    pub fn refusing() -> Self {
        Self {
            refusing: true,
            ..Self::default()
        }
    }

    /// Both directions take `delay`.
    pub fn slow(delay: Duration) -> Self {
        Self::of_both(Direction {
            delay,
            ..Direction::default()
        })
    }

    /// Whatever is larger than `bytes` breaks off on its way to where one connected to.
    pub fn breaking_after(bytes: u64) -> Self {
        let to_target = Direction {
            breaks_after: Some(bytes),
            ..Direction::default()
        };
        Self {
            to_target,
            ..Self::default()
        }
    }

    /// Both directions are the same.
    pub fn of_both(direction: Direction) -> Self {
        Self {
            refusing: false,
            to_target: direction,
            to_client: direction,
        }
    }
}

/// A running proxy. Dropping it closes its port and all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    target: watch::Sender<SocketAddr>,
    cuts: watch::Sender<u64>,
    accepted: Arc<AtomicU64>,
    broken: Arc<AtomicU64>,
    _task: JoinSet<()>,
}

/// What each connection looks at.
#[derive(Clone)]
struct Orders {
    network: watch::Receiver<Network>,
    target: watch::Receiver<SocketAddr>,
    cuts: watch::Receiver<u64>,
    accepted: Arc<AtomicU64>,
    broken: Arc<AtomicU64>,
}

impl Proxy {
    /// Listens on a free loopback port and forwards every connection to `target`.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a free port");
        let (network, network_orders) = watch::channel(Network::default());
        let (target, target_orders) = watch::channel(target);
        let (cuts, cut_orders) = watch::channel(0);
        let orders = Orders {
            network: network_orders,
            target: target_orders,
            cuts: cut_orders,
            accepted: Arc::default(),
            broken: Arc::default(),
        };
        let (accepted, broken) = (Arc::clone(&orders.accepted), Arc::clone(&orders.broken));
        let address = listener.local_addr().expect("a bound port");
        let mut task = JoinSet::new();
        task.spawn(accept(listener, orders));
        Self {
            address,
            network,
            target,
            cuts,
            accepted,
            broken,
            _task: task,
        }
    }

    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what the network does, for open connections too.
    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }

    /// Undoes everything that [`Proxy::set`] did.
    pub fn heal(&self) {
        self.set(Network::default());
    }

    /// Resets every open connection; what is on its way is lost. New ones are as before.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Forwards new connections to `target`, as an address that moved to another replica.
    pub fn retarget(&self, target: SocketAddr) {
        self.target.send_replace(target);
    }

    /// How many connections it has accepted so far, without those it refused.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// How many connections broke by [`Direction::breaks_after`].
    pub fn broken(&self) -> u64 {
        self.broken.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, orders: Orders) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                if orders.network.borrow().refusing || connections.len() >= CONNECTIONS_MAX {
                    let _ = client.set_zero_linger();
                    continue;
                }
                orders.accepted.fetch_add(1, Ordering::SeqCst);
                connections.spawn(connection(client, orders.clone()));
            }
        }
    }
}

async fn connection(mut client: TcpStream, mut orders: Orders) {
    // Only a cut from now on counts.
    orders.cuts.mark_unchanged();
    let at = *orders.target.borrow();
    let Ok(mut target) = TcpStream::connect(at).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = client.set_nodelay(true).and(target.set_nodelay(true));
    let broken = {
        let ((from_client, to_client), (from_target, to_target)) = (client.split(), target.split());
        let both = async {
            tokio::try_join!(
                forward(from_client, to_target, &orders.network, |n| n.to_target),
                forward(from_target, to_client, &orders.network, |n| n.to_client),
            )
        };
        tokio::select! {
            // A cut comes before bytes that another order lets go at the same moment.
            biased;
            _ = orders.cuts.changed() => true,
            ended = both => match ended {
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    orders.broken.fetch_add(1, Ordering::SeqCst);
                    true
                }
                ended => ended.is_err(),
            }
        }
    };
    if broken {
        // The peers see a reset, not an end in good order.
        let _ = client.set_zero_linger();
        let _ = target.set_zero_linger();
    }
}

/// Forwards one direction until its sender has ended it.
async fn forward(
    from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    network: &watch::Receiver<Network>,
    direction: fn(&Network) -> Direction,
) -> io::Result<()> {
    let (sender, chunks) = mpsc::channel(CHUNKS_MAX);
    let reading = read(from, sender, network.clone(), direction);
    let writing = write(to, chunks, network.clone(), direction);
    tokio::try_join!(reading, writing).map(drop)
}

/// Reads chunks, each with the time at which it arrives.
async fn read(
    mut from: ReadHalf<'_>,
    chunks: mpsc::Sender<(Instant, Vec<u8>)>,
    network: watch::Receiver<Network>,
    direction: fn(&Network) -> Direction,
) -> io::Result<()> {
    loop {
        let mut chunk = vec![0; CHUNK_BYTES];
        let length = from.read(&mut chunk).await?;
        let arrival = Instant::now() + direction(&network.borrow()).delay;
        chunk.truncate(length);
        // An empty chunk is the end, which is late too.
        if chunks.send((arrival, chunk)).await.is_err() || length == 0 {
            return Ok(());
        }
    }
}

async fn write(
    mut to: WriteHalf<'_>,
    mut chunks: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut network: watch::Receiver<Network>,
    direction: fn(&Network) -> Direction,
) -> io::Result<()> {
    let mut arrived = 0;
    while let Some((arrival, chunk)) = chunks.recv().await {
        tokio::time::sleep_until(arrival).await;
        let mut rest = &chunk[..];
        loop {
            let now = network.wait_for(|n| !direction(n).stopped).await;
            let rate = now.map_err(io::Error::other)?.to_owned();
            if rest.is_empty() {
                break;
            }
            let slice = slice_bytes(direction(&rate).bytes_per_s, rest.len());
            if let Some(most) = direction(&rate).breaks_after
                && arrived + slice as u64 > most
            {
                let some = most.saturating_sub(arrived) as usize;
                to.write_all(&rest[..some]).await?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            to.write_all(&rest[..slice]).await?;
            arrived += slice as u64;
            rest = &rest[slice..];
            if let Some(bytes_per_s) = direction(&rate).bytes_per_s {
                let share = slice as f64 / bytes_per_s.max(1) as f64;
                tokio::time::sleep(Duration::from_secs_f64(share)).await;
            }
        }
    }
    to.shutdown().await
}

/// How many of `length` bytes are written before the next look at the orders.
fn slice_bytes(bytes_per_s: Option<u64>, length: usize) -> usize {
    let Some(bytes_per_s) = bytes_per_s else {
        return length;
    };
    let slice = bytes_per_s.saturating_mul(SLICE.as_millis() as u64) / 1000;
    length
        .min(usize::try_from(slice).unwrap_or(usize::MAX))
        .max(1)
}

#[cfg(test)]
mod tests;
