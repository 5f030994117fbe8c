//! `ModelService`: whether somebody serves a model, for clients that wait for one.
//!
//! Who serves which models is one list for all projects. A client asks by name, so that it is told of none that it does
//! not know, and adapters of other projects do not count, whatever they are called.

use std::sync::Arc;

use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::worker::serving::check_text;
use tonic::{Request, Response, Status};

use super::Shared;
use crate::auth::{Call, Scope};

/// The service.
#[derive(Clone)]
pub struct ModelApi(pub Arc<Shared>);

#[tonic::async_trait]
impl v1::model_service_server::ModelService for ModelApi {
    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::Model>, Status> {
        let token = self.0.auth.admit(request.metadata(), Call::GetModel)?;
        let scope = token.project.clone();
        let name = request.into_inner().name;
        check_text("name", &name).map_err(ApiError::Field)?;
        let endpoints = count(&self.0.endpoints.borrow(), &name, &scope);
        Ok(Response::new(v1::Model { name, endpoints }))
    }
}

/// How many endpoints serve `model` to projects of `scope`; the list is bounded.
fn count(endpoints: &v1::Endpoints, model: &str, scope: &Scope) -> u32 {
    let is_theirs = |project: &str| match scope {
        Scope::All => true,
        Scope::Project(own) => project.is_empty() || own.as_str() == project,
    };
    let serving = endpoints.endpoints.iter();
    let serving = serving.filter(|e| e.model == model && is_theirs(&e.project));
    u32::try_from(serving.count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_endpoints_of_that_name_and_no_other_project_count() {
        let endpoint = |(model, project): (&str, &str)| v1::ModelEndpoint {
            model: model.to_owned(),
            project: project.to_owned(),
            ..v1::ModelEndpoint::default()
        };
        let all = [
            ("shop", ""),
            ("shop@v1", ""),
            ("shop@v1", "p"),
            ("shop@v1", "q"),
        ];
        let endpoints = v1::Endpoints {
            endpoints: all.map(endpoint).to_vec(),
        };
        let of = |model: &str, scope: &Scope| count(&endpoints, model, scope);
        let own = Scope::Project("p".parse().unwrap());
        let other = Scope::Project("r".parse().unwrap());
        assert_eq!((of("shop@v1", &own), of("shop@v1", &other)), (2, 1));
        assert_eq!((of("shop@v1", &Scope::All), of("shop@v2", &own)), (3, 0));
    }
}
