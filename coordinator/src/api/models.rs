//! `ModelService`: whether somebody serves a model, for clients that wait for one.
//!
//! Who serves which models is one list for all projects. A client asks by name, so that it is told of none that it does
//! not know.

use std::sync::Arc;

use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::worker::serving::check_text;
use tonic::{Request, Response, Status};

use super::Shared;
use crate::auth::Call;

/// The service.
#[derive(Clone)]
pub struct ModelApi(pub Arc<Shared>);

#[tonic::async_trait]
impl v1::model_service_server::ModelService for ModelApi {
    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::Model>, Status> {
        self.0.auth.admit(request.metadata(), Call::GetModel)?;
        let name = request.into_inner().name;
        check_text("name", &name).map_err(ApiError::Field)?;
        let endpoints = count(&self.0.endpoints.borrow(), &name);
        Ok(Response::new(v1::Model { name, endpoints }))
    }
}

/// How many endpoints serve `model`; the list is bounded.
fn count(endpoints: &v1::Endpoints, model: &str) -> u32 {
    let serving = endpoints.endpoints.iter().filter(|e| e.model == model);
    u32::try_from(serving.count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_endpoints_of_that_name_count() {
        let endpoint = |model: &str| v1::ModelEndpoint {
            model: model.to_owned(),
            ..v1::ModelEndpoint::default()
        };
        let endpoints = v1::Endpoints {
            endpoints: ["shop", "shop@v1", "shop@v1"].map(endpoint).to_vec(),
        };
        assert_eq!(count(&endpoints, "shop@v1"), 2);
        assert_eq!(count(&endpoints, "shop@v2"), 0);
    }
}
