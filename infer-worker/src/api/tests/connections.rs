//! Who gets a connection when there are many.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

async fn start(connections: usize, spare: usize, first_header: Duration) -> Server {
    let bounds = Bounds {
        connections,
        spare,
        first_header,
    };
    Server::start_within(None, Duration::from_secs(60), bounds).await
}

async fn connect(server: &Server) -> TcpStream {
    let address = server.url.strip_prefix("http://").unwrap();
    TcpStream::connect(address).await.unwrap()
}

/// Asks for the server's health on a connection that is kept.
async fn healthy(stream: &mut TcpStream) {
    let request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nok") {
        assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "closed");
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test]
async fn the_silent_give_way() {
    let server = start(2, 0, Duration::from_secs(60)).await;
    let mut kept = connect(&server).await;
    healthy(&mut kept).await;
    let mut silent = connect(&server).await;
    server.chat_json("hi", json!({})).await;
    assert_eq!(kept.read(&mut [0]).await.unwrap(), 0, "silent for longest");
    healthy(&mut silent).await;
}

#[tokio::test]
async fn a_server_at_work_says_how_it_does() {
    let server = start(1, 1, Duration::from_secs(60)).await;
    let streamed = server.chat("slow", json!({"stream": true})).send();
    let streamed = streamed.await.unwrap();
    let get = async |path: &str| {
        let sent = server.client.get(format!("{}{path}", server.url)).send();
        sent.await.unwrap()
    };
    for _ in 0..2 {
        assert_eq!(get("/health").await.status(), 200);
        let refused = get("/v1/models").await;
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["retry-after"]),
            (503, &"1".parse().unwrap())
        );
        let body: Value = refused.json().await.unwrap();
        assert_eq!(body["error"]["code"], "connections_full");
    }
    server.backend.go.notify_one();
    events(&streamed.text().await.unwrap());
}

#[tokio::test]
async fn who_connects_must_say_something() {
    let server = start(8, 0, Duration::from_secs(1)).await;
    let mut kept = connect(&server).await;
    healthy(&mut kept).await;
    let mut slow = connect(&server).await;
    slow.write_all(b"GET /health HTTP/1.1\r\nhost:")
        .await
        .unwrap();
    assert_eq!(slow.read(&mut [0]).await.unwrap(), 0);
    healthy(&mut kept).await;
}
