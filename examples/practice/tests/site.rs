//! The site over real HTTP, and that its rendered pages agree with the answers that the tasks expect.
#![expect(
    clippy::unwrap_used,
    reason = "a test file has no cfg(test) module, so clippy does not see that all of it is tests"
)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use espalier_practice::tasks::{Split, generate};
use espalier_practice::{site, world};
use regex::Regex;
use reqwest::StatusCode;
use reqwest::redirect::Policy;
use serde_json::Value;
use tokio::net::TcpListener;

/// Runs `scenario` against a site of seed 7.
async fn with_site<F: Future<Output = ()>>(scenario: impl FnOnce(Visitor) -> F) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let visitor = Visitor {
        base: format!("http://{}", listener.local_addr().unwrap()),
        http: reqwest::Client::builder()
            .redirect(Policy::none())
            .build()
            .unwrap(),
    };
    tokio::select! {
        ended = site::serve(listener, 7, std::future::pending()) => panic!("the site ended: {ended:?}"),
        () = scenario(visitor) => {}
    }
}

struct Visitor {
    base: String,
    http: reqwest::Client,
}

impl Visitor {
    async fn get(&self, path: &str) -> String {
        let response = self.send(self.http.get(self.url(path))).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.text().await.unwrap()
    }

    async fn post(&self, path: &str, fields: &[(&str, &str)]) -> reqwest::Response {
        let pairs: Vec<String> = fields
            .iter()
            .map(|(name, value)| format!("{name}={}", value.replace(' ', "+")))
            .collect();
        let request = self
            .http
            .post(self.url(path))
            .header("content-type", "application/x-www-form-urlencoded")
            .body(pairs.join("&"));
        self.send(request).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> reqwest::Response {
        request.send().await.unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Logs in and returns the account's page.
    async fn account(&self, user: &str, password: &str) -> String {
        let fields = [("user", user), ("password", password)];
        let response = self.post("/login", &fields).await;
        assert_eq!(response.headers()["location"], "/account");
        let cookie = response.headers()["set-cookie"]
            .to_str()
            .unwrap()
            .to_owned();
        let cookie = cookie.split(';').next().unwrap().to_owned();
        let request = self.http.get(self.url("/account")).header("cookie", cookie);
        self.send(request).await.text().await.unwrap()
    }
}

fn captures(pattern: &str, text: &str) -> Vec<String> {
    Regex::new(pattern)
        .unwrap()
        .captures_iter(text)
        .map(|found| found[1].to_owned())
        .collect()
}

fn by_id(id: &str, html: &str) -> String {
    captures(&format!("<dd id=\"{id}\">([^<]*)</dd>"), html).remove(0)
}

fn quoted(prompt: &str) -> Vec<String> {
    captures("\"([^\"]*)\"", prompt)
}

/// The path of the address in a prompt.
fn path_in(prompt: &str) -> String {
    captures(r"\$\{site\}(/[a-z/-]*)", prompt).remove(0)
}

fn rank_in(prompt: &str) -> usize {
    let word = captures("is the (first|second|third|fourth) of", prompt).remove(0);
    ["first", "second", "third", "fourth"]
        .iter()
        .position(|w| *w == word)
        .unwrap()
}

/// What a careful visitor answers, from the rendered pages alone.
async fn solve(visitor: &Visitor, kind: &str, prompt: &str) -> String {
    let names = quoted(prompt);
    let find = |field: &str, value: &str| format!("/shop?{field}={}", value.replace(' ', "+"));
    match kind {
        "shop_price" => {
            let html = visitor.get(&find("q", &names[0])).await;
            captures("</a> ([0-9.]+)</li>", &html).remove(0)
        }
        "shop_talk" => {
            let html = visitor.get(&find("q", &names[0])).await;
            let path = captures("href=\"(/shop/product/[^\"]*)\"", &html).remove(0);
            by_id("stock", &visitor.get(&path).await)
        }
        "shop_rank" => {
            let sort = if prompt.contains("dearest") {
                "down"
            } else {
                "up"
            };
            let path = format!("{}&sort={sort}", find("category", &names[0]));
            let html = visitor.get(&path).await;
            captures("<li><a href=\"/shop/product/[^\"]*\">([^<]*)</a>", &html)
                .remove(rank_in(prompt))
        }
        "shop_count" => {
            let path = format!("{}&max={}", find("category", &names[0]), names[1]);
            captures("([0-9]+) found", &visitor.get(&path).await).remove(0)
        }
        "table_rank" => {
            let dir = if prompt.contains("largest") {
                "down"
            } else {
                "up"
            };
            let sort = names[0].to_lowercase();
            let path = format!("{}?sort={sort}&dir={dir}", path_in(prompt));
            captures("<tr><td>([^<]*)</td>", &visitor.get(&path).await).remove(rank_in(prompt))
        }
        "new_tab" => {
            let html = visitor.get(&path_in(prompt)).await;
            let pattern = format!(
                "href=\"([^\"]*)\" target=\"_blank\" rel=\"noopener\">{}<",
                names[0]
            );
            by_id("word", &visitor.get(&captures(&pattern, &html)[0]).await)
        }
        "late_page" => by_id("word", &visitor.get(&path_in(prompt)).await),
        "slow_page" => by_id("total", &visitor.get(&path_in(prompt)).await),
        "login" => by_id(&names[2], &visitor.account(&names[0], &names[1]).await),
        "booking" => {
            let fields = [
                ("name", names[0].as_str()),
                ("guests", &names[1]),
                ("day", &names[2]),
                ("time", &names[3]),
                ("agree", "yes"),
            ];
            let response = visitor.post("/booking/confirm", &fields).await;
            by_id("code", &response.text().await.unwrap())
        }
        other => panic!("no way to solve {other}"),
    }
}

/// Whether the verifier's own text holds the answer, as a number where it asks for one.
fn expects(verify: &Value, answer: &str) -> bool {
    match verify {
        Value::Number(number) => answer.parse::<f64>().ok() == number.as_f64(),
        Value::String(text) => text.contains(answer),
        Value::Array(items) => items.iter().any(|item| expects(item, answer)),
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, _)| !matches!(name.as_str(), "weight" | "tolerance" | "url"))
            .any(|(_, value)| expects(value, answer)),
        _ => false,
    }
}

#[tokio::test]
async fn every_known_answer_is_what_the_pages_show() {
    with_site(async |visitor| {
        let mut kinds: HashMap<String, usize> = HashMap::new();
        for task in generate(7, 160, Split::Train) {
            let kind = task["task_kind"].as_str().unwrap();
            let seen = kinds.entry(kind.to_owned()).or_default();
            *seen += 1;
            // Each report takes over a second to come, so two of them are enough.
            if kind == "slow_page" && *seen > 2 {
                continue;
            }
            let prompt = match &task["prompt"] {
                Value::Array(turns) => turns.last().unwrap().as_str().unwrap(),
                prompt => prompt.as_str().unwrap(),
            };
            let answer = solve(&visitor, kind, prompt).await;
            assert!(!answer.is_empty());
            assert!(expects(&task["verify"], &answer), "{answer}: {task}");
        }
        assert_eq!(kinds.len(), 10);
    })
    .await;
}

#[tokio::test]
async fn every_link_on_the_way_leads_to_a_page() {
    with_site(async |visitor| {
        let mut paths = captures("<a href=\"(/[^\"]*)\"", &visitor.get("/").await);
        assert_eq!(paths.len(), 9);
        for path in ["/crew", "/notices", "/shop"] {
            paths.extend(captures(
                "<li><a href=\"(/[^\"]*)\"",
                &visitor.get(path).await,
            ));
        }
        for path in paths {
            let html = visitor.get(&path.replace("&amp;", "&")).await;
            assert_eq!(html.matches("<h1>").count(), 1, "{path}");
            assert_eq!(html.matches("<title>").count(), 1, "{path}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_does_not_exist_is_404() {
    with_site(async |visitor| {
        let paths = [
            "/nothing",
            "/shop/product/no-such",
            "/crew/no-such",
            "/notices/no-such",
            "/notices/bay/no-such",
            "/late/no-such",
        ];
        for path in paths {
            let response = visitor.send(visitor.http.get(visitor.url(path))).await;
            assert_eq!(response.status(), StatusCode::NOT_FOUND, "{path}");
            assert!(response.text().await.unwrap().contains("role=\"alert\""));
        }
    })
    .await;
}

#[tokio::test]
async fn an_account_needs_its_password_and_ends_with_the_logout() {
    with_site(async |visitor| {
        let world = world::World::new(7);
        let account = &world.accounts[3];
        let wrong = [("user", account.user.as_str()), ("password", "wrong")];
        let html = visitor.post("/login", &wrong).await.text().await.unwrap();
        assert!(html.contains("User or password is wrong"));
        assert!(!html.contains("value=\"wrong\""));

        let right = [
            ("user", account.user.as_str()),
            ("password", &account.password),
        ];
        let response = visitor.post("/login", &right).await;
        let cookie = response.headers()["set-cookie"]
            .to_str()
            .unwrap()
            .to_owned();
        let cookie = cookie.split(';').next().unwrap().to_owned();
        let open = async |path: &str| {
            let request = visitor
                .http
                .get(visitor.url(path))
                .header("cookie", &cookie);
            visitor.send(request).await
        };
        assert_eq!(open("/account").await.status(), StatusCode::OK);
        assert_eq!(open("/logout").await.headers()["location"], "/login");
        assert_eq!(open("/account").await.headers()["location"], "/login");
    })
    .await;
}

#[tokio::test]
async fn the_slow_page_is_slow_and_a_later_step_needs_the_first() {
    with_site(async |visitor| {
        let start = Instant::now();
        visitor.get("/slow/oak-harbor").await;
        assert!(start.elapsed() >= Duration::from_millis(site::SLOW_DELAY_MS));
        let request = visitor.http.get(visitor.url("/booking/confirm"));
        assert_eq!(
            visitor.send(request).await.headers()["location"],
            "/booking"
        );
        let big = "x".repeat(20_000);
        let response = visitor.post("/booking/when", &[("name", &big)]).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    })
    .await;
}
