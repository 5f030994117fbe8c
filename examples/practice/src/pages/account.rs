//! The login and the account page behind it. Sessions are the site's business; here is only what is shown.

use serde::Deserialize;

use crate::page::{Block, Fact, Field, Form, Input, Link, Method, Page};
use crate::world::{Account, World, money};

/// What a visitor entered to log in.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Login {
    /// The name of the account.
    pub user: String,
    /// Its password.
    pub password: String,
}

/// The account that `login` opens, if name and password belong together.
pub fn check<'a>(world: &'a World, login: &Login) -> Option<&'a Account> {
    world
        .account(login.user.trim())
        .filter(|account| account.password == login.password)
}

/// The login form; `failed` carries the name that was tried in vain.
pub fn login(failed: Option<&str>) -> Page {
    let page = Page::new("Login");
    let page = match failed {
        Some(_) => page.with(Block::Alert("User or password is wrong".into())),
        None => page,
    };
    page.with(Block::Form(Form {
        action: "/login",
        method: Method::Post,
        hidden: vec![],
        fields: vec![
            Field {
                label: "User",
                name: "user",
                input: Input::Text(failed.unwrap_or_default().to_owned()),
            },
            Field {
                label: "Password",
                name: "password",
                input: Input::Password,
            },
        ],
        button: "Log in",
    }))
}

/// The page of the account that is logged in.
pub fn account(account: &Account) -> Page {
    let fact = |name, value, id| Fact { name, value, id };
    Page::new("Your account")
        .with(Block::Facts(vec![
            fact("User", account.user.clone(), "user"),
            fact("Balance", money(account.balance_cents), "balance"),
            fact("Points", account.points.to_string(), "points"),
            fact("Plan", account.plan.to_owned(), "plan"),
        ]))
        .with(Block::Links(vec![Link::new("Log out", "/logout")]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_password_opens_an_account() {
        let world = World::new(7);
        let account = &world.accounts[0];
        let mut login = Login {
            user: account.user.clone(),
            password: account.password.clone(),
        };
        assert_eq!(check(&world, &login), Some(account));
        login.password.push('x');
        assert_eq!(check(&world, &login), None);
        login.user = "nobody".into();
        assert_eq!(check(&world, &login), None);
    }
}
