use std::io::ErrorKind;

use tokio::time::timeout;

use super::*;

/// Long against everything that should happen, short against the patience of a test run.
const SOON: Duration = Duration::from_secs(10);
/// Long enough that what should not come would have come on loopback.
const SILENCE: Duration = Duration::from_millis(200);

/// A server that sends back what it gets and ends when its client does.
struct Echo {
    address: SocketAddr,
    _task: JoinSet<()>,
}

impl Echo {
    /// Puts `mark` before what it sends back.
    async fn start(mark: &'static [u8]) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                connections.spawn(async move {
                    let (mut read, mut write) = client.split();
                    let _ = write.write_all(mark).await;
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        Self {
            address,
            _task: task,
        }
    }
}

async fn pair() -> (Echo, Proxy, TcpStream) {
    let echo = Echo::start(b"").await;
    let proxy = Proxy::start(echo.address).await;
    let client = TcpStream::connect(proxy.address()).await.unwrap();
    (echo, proxy, client)
}

async fn read_exactly(client: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let read = timeout(SOON, client.read_exact(&mut bytes)).await;
    read.expect("bytes come").unwrap();
    bytes
}

async fn echoed(client: &mut TcpStream, bytes: &[u8]) {
    client.write_all(bytes).await.unwrap();
    assert_eq!(read_exactly(client, bytes.len()).await, bytes);
}

async fn assert_silent(client: &mut TcpStream) {
    let mut byte = [0];
    let read = timeout(SILENCE, client.read(&mut byte)).await;
    assert!(read.is_err(), "{read:?}");
}

#[tokio::test]
async fn it_forwards_both_ways_and_passes_the_end_on() {
    let (_echo, proxy, mut client) = pair().await;
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut read, mut write) = client.split();
    let mut back = Vec::new();
    let send = async {
        write.write_all(&big).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let receive = async { read.read_to_end(&mut back).await.unwrap() };
    timeout(SOON, async { tokio::join!(send, receive) })
        .await
        .expect("the echo ends");
    assert!(back == big);
    assert_eq!(proxy.accepted(), 1);
}

#[tokio::test]
async fn a_cut_resets_open_connections_only() {
    let (_echo, proxy, mut client) = pair().await;
    echoed(&mut client, b"before").await;
    proxy.cut();
    let read = timeout(SOON, client.read(&mut [0])).await.expect("an end");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut again = TcpStream::connect(proxy.address()).await.unwrap();
    echoed(&mut again, b"after").await;
}

#[tokio::test]
async fn new_connections_are_refused_until_healed() {
    let (_echo, proxy, mut client) = pair().await;
    echoed(&mut client, b"before").await;
    proxy.set(Network::refusing());
    let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
    let read = timeout(SOON, refused.read(&mut [0])).await.expect("an end");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    echoed(&mut client, b"open ones stay").await;
    proxy.heal();
    let mut again = TcpStream::connect(proxy.address()).await.unwrap();
    echoed(&mut again, b"after").await;
    assert_eq!(proxy.accepted(), 2);
}

#[tokio::test]
async fn a_stopped_direction_is_silent_and_loses_nothing_when_healed() {
    let (_echo, proxy, mut client) = pair().await;
    echoed(&mut client, b"before").await;
    for network in [Network::deaf(), Network::mute(), Network::partitioned()] {
        proxy.set(network);
        client.write_all(b"lost?").await.unwrap();
        assert_silent(&mut client).await;
        proxy.heal();
        assert_eq!(read_exactly(&mut client, 5).await, b"lost?");
    }
}

#[tokio::test]
async fn the_reply_of_work_that_was_done_can_be_lost() {
    let (echo, proxy, mut client) = pair().await;
    echoed(&mut client, b"before").await;
    proxy.set(Network::deaf());
    client.write_all(b"work").await.unwrap();
    assert_silent(&mut client).await;
    proxy.cut();
    proxy.heal();
    let read = timeout(SOON, client.read(&mut [0])).await.expect("an end");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    drop(echo);
}

#[tokio::test]
async fn delay_is_latency_and_not_a_limit_of_throughput() {
    let (_echo, proxy, mut client) = pair().await;
    let delay = Duration::from_millis(150);
    proxy.set(Network::slow(delay));
    let began = Instant::now();
    for n in 0..20_u8 {
        client.write_all(&[n]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(read_exactly(&mut client, 20).await.len(), 20);
    let took = began.elapsed();
    assert!(took >= 2 * delay, "{took:?}");
    assert!(took < 10 * delay, "each byte waits by itself: {took:?}");
}

#[tokio::test]
async fn a_throttled_direction_takes_its_time() {
    let (_echo, proxy, mut client) = pair().await;
    let mut network = Network::default();
    network.to_client.bytes_per_s = Some(100_000);
    proxy.set(network);
    let began = Instant::now();
    echoed(&mut client, &[7; 30_000]).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(200), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test]
async fn new_connections_go_where_it_points() {
    let (_first, proxy, mut client) = pair().await;
    echoed(&mut client, b"before").await;
    let second = Echo::start(b"second ").await;
    proxy.retarget(second.address);
    echoed(&mut client, b"open ones stay").await;
    let mut moved = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(read_exactly(&mut moved, 7).await, b"second ");
}

#[tokio::test]
async fn a_target_that_is_away_looks_like_a_reset() {
    let (echo, proxy, _client) = pair().await;
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    proxy.retarget(nobody.local_addr().unwrap());
    drop((echo, nobody));
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    let read = timeout(SOON, client.read(&mut [0])).await.expect("an end");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn slices_are_small_where_the_rate_is() {
    assert_eq!(slice_bytes(None, 5000), 5000);
    assert_eq!(slice_bytes(Some(100_000), 5000), 2000);
    assert_eq!(slice_bytes(Some(100_000), 500), 500);
    assert_eq!(slice_bytes(Some(1), 500), 1);
}

#[tokio::test]
async fn what_is_too_large_breaks_off_half_way_and_what_is_small_gets_through() {
    let (_echo, proxy, mut client) = pair().await;
    proxy.set(Network::breaking_after(1_000));
    echoed(&mut client, &[7; 600]).await;
    assert_eq!(proxy.broken(), 0);
    // The rest of what may arrive does; then the connection is reset.
    client.write_all(&[8; 600]).await.unwrap();
    let mut rest = Vec::new();
    let ended = timeout(SOON, client.read_to_end(&mut rest)).await;
    let ended = ended.expect("it ends");
    assert!(
        ended.is_err() || rest.len() == 400,
        "{ended:?}, {} bytes",
        rest.len()
    );
    assert!(rest.len() <= 400, "{} bytes", rest.len());
    assert_eq!(proxy.broken(), 1);
    proxy.heal();
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    echoed(&mut client, &[9; 2_000]).await;
}
