//! Pods as instances: makes them where the budget allows, finds those of earlier coordinators, ends them.
//!
//! A pod says whose it is in its environment, so that any coordinator with the same configuration finds it; nothing is stored here.
//! Before a pod is made, the account is looked through for one of its name: a reply that was lost makes no second pod.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::choose::{self, Offer, Offers};
use super::client::Client;
use super::config::{Cloud, RunpodConfig, RunpodPool};
use super::error::ApiError;
use super::wire::{Availability, GpuType, Pod, PodStatus};
use crate::scaler::provider::{Answer, Instance, InstanceState, Provider, ProviderError};

/// How long a list of pods counts where nothing has put it in doubt: some pods are made after one look, and RunPod's
/// limits on requests are not spent on looking.
const PODS_FRESH: Duration = Duration::from_secs(10);
/// How long the catalogue counts, and that a GPU was not to be had.
const CATALOGUE_FRESH: Duration = Duration::from_secs(60);

/// Workers in pods of one account.
#[derive(Debug)]
pub struct Runpod {
    config: RunpodConfig,
    client: Client,
    /// Held while a pod is made, over requests that all have deadlines: two at once would each spend what the other counts on.
    known: Mutex<Known>,
}

/// What RunPod said a moment ago.
#[derive(Debug, Default)]
struct Known {
    /// All pods of the account.
    pods: Option<(Instant, Vec<Pod>)>,
    /// The catalogue for so many GPUs in one pod of a cloud.
    catalogues: BTreeMap<(u32, Cloud), (Instant, Vec<GpuType>)>,
}

impl Runpod {
    /// Speaks to the account that `config` names, which was validated.
    ///
    /// # Errors
    /// The key cannot be shown.
    pub fn new(config: RunpodConfig) -> Result<Self, ApiError> {
        let client = Client::new(&config.url, &config.api_key)?;
        Ok(Self {
            client,
            config,
            known: Mutex::default(),
        })
    }

    /// What it speaks with.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// All pods of this scaler that are not gone.
    ///
    /// # Errors
    /// RunPod did not say.
    pub async fn pods(&self) -> Result<Vec<Pod>, ApiError> {
        let mut known = self.known.lock().await;
        let all = self.look(&mut known).await?;
        let own = all.iter().filter(|pod| self.is_own(pod));
        Ok(own.cloned().collect())
    }

    fn is_own(&self, pod: &Pod) -> bool {
        pod.is_of(&self.config.name) && pod.status != PodStatus::Terminated
    }

    async fn look<'a>(&self, known: &'a mut Known) -> Result<&'a mut Vec<Pod>, ApiError> {
        known.pods = None;
        let pods = self.client.pods().await?;
        let (_, pods) = known.pods.insert((Instant::now(), pods));
        Ok(pods)
    }

    /// The pods of the account, as they were a moment ago.
    async fn recent<'a>(&self, known: &'a mut Known) -> Result<&'a mut Vec<Pod>, ApiError> {
        let is_fresh = |(at, _): &(Instant, Vec<Pod>)| at.elapsed() < PODS_FRESH;
        if !known.pods.as_ref().is_some_and(is_fresh) {
            return self.look(known).await;
        }
        let (_, pods) = known
            .pods
            .get_or_insert_with(|| (Instant::now(), Vec::new()));
        Ok(pods)
    }

    async fn make(&self, pool: &str, name: &str) -> Result<(), ProviderError> {
        let pool = self.config.pool(pool).ok_or_else(|| {
            ProviderError::Refused(format!("`{pool}` is no pool of the configuration"))
        })?;
        let mut known = self.known.lock().await;
        let pods = self.recent(&mut known).await?;
        let same = |pod: &&Pod| {
            pod.name == name || (pod.is_of(&self.config.name) && pod.marks.instance == name)
        };
        match pods
            .iter()
            .filter(|pod| pod.status != PodStatus::Terminated)
            .find(same)
        {
            Some(pod) if self.is_own(pod) => return Ok(()),
            Some(pod) => return Err(taken(name, &pod.id)),
            None => {}
        }
        let running: f64 = pods
            .iter()
            .filter(|pod| self.is_own(pod))
            .map(|pod| pod.cost)
            .sum();
        let catalogue = self.catalogue(&mut known, pool).await?;
        let max = self.config.max_per_hour;
        let found = choose::offers(pool, catalogue, max - running, max);
        self.try_in_order(&mut known, pool, name, &found, running)
            .await
    }

    /// Asks for one after the other until there is a pod.
    async fn try_in_order(
        &self,
        known: &mut Known,
        pool: &RunpodPool,
        name: &str,
        found: &Offers<'_>,
        running: f64,
    ) -> Result<(), ProviderError> {
        // Until it is known what came of it, the list is in doubt: the caller may stop waiting at any time.
        let mut listed = known.pods.take();
        let mut refused = None;
        for offer in &found.offers {
            let pod = pool.pod(&self.config.name, name, offer.gpu);
            match self.client.create(&pod).await {
                Ok(pod) => return self.made(known, listed, pod, *offer, running).await,
                Err(error) if error.is_of_the_gpu() => {
                    tracing::debug!(name, gpu = offer.gpu, %error, "RunPod has no such pod");
                    known.sold_out(pool, offer.gpu);
                    refused = Some(error);
                }
                Err(error) => {
                    listed = listed.filter(|_| !error.may_be_done());
                    known.pods = listed;
                    return Err(error.into());
                }
            }
        }
        known.pods = listed;
        Err(nothing(found, refused))
    }

    /// A pod that there is now. What it costs is known for sure only now.
    async fn made(
        &self,
        known: &mut Known,
        listed: Option<(Instant, Vec<Pod>)>,
        pod: Pod,
        offer: Offer<'_>,
        running: f64,
    ) -> Result<(), ProviderError> {
        if choose::is_over(running + pod.cost, self.config.max_per_hour) {
            self.client.delete(&pod.id).await?;
            return Err(ProviderError::NoCapacity(format!(
                "`{}` costs ${:.2} an hour, and not ${:.2} as the catalogue has it: that is over `max_per_hour`",
                offer.gpu, pod.cost, offer.price
            )));
        }
        tracing::info!(
            pod = pod.id,
            name = pod.name,
            gpu = offer.gpu,
            price_per_hour = pod.cost,
            "pod created"
        );
        known.pods = listed.map(|(at, mut pods)| {
            pods.push(pod);
            (at, pods)
        });
        Ok(())
    }

    async fn catalogue<'a>(
        &self,
        known: &'a mut Known,
        pool: &RunpodPool,
    ) -> Result<&'a [GpuType], ApiError> {
        let key = (pool.gpu_count, pool.cloud);
        let kept = known.catalogues.remove(&key);
        let kept = kept.filter(|(at, _)| at.elapsed() < CATALOGUE_FRESH);
        let kept = match kept {
            Some(kept) => kept,
            None => (
                Instant::now(),
                self.client.gpus(pool.gpu_count, pool.cloud).await?,
            ),
        };
        let (_, gpus) = known.catalogues.entry(key).insert_entry(kept).into_mut();
        Ok(gpus)
    }

    async fn end(&self, instance: &Instance) -> Result<(), ProviderError> {
        self.client.delete(&instance.id).await?;
        tracing::info!(pod = instance.id, name = instance.name, "pod ended");
        let mut known = self.known.lock().await;
        if let Some((_, pods)) = &mut known.pods {
            pods.retain(|pod| pod.id != instance.id);
        }
        Ok(())
    }
}

impl Known {
    /// The next pods need not ask for this GPU, as long as the catalogue counts.
    fn sold_out(&mut self, pool: &RunpodPool, id: &str) {
        let catalogue = self.catalogues.get_mut(&(pool.gpu_count, pool.cloud));
        let gpus = catalogue.into_iter().flat_map(|(_, gpus)| gpus);
        for gpu in gpus.filter(|gpu| gpu.id == id) {
            gpu.availability = Availability::None;
        }
    }
}

fn taken(name: &str, id: &str) -> ProviderError {
    ProviderError::Refused(format!(
        "the account has another pod `{name}` ({id}), which is not of this scaler: give that one another name, or the \
         scaler"
    ))
}

/// Why no pod could be made.
fn nothing(found: &Offers<'_>, refused: Option<ApiError>) -> ProviderError {
    let passed_over = found.says();
    match refused {
        // RunPod words a rule that is broken and a lack of machines alike.
        Some(ApiError::Refused {
            status: 403, says, ..
        }) => ProviderError::Refused(format!(
            "the key may not make such pods: {}",
            joined(&says, &passed_over)
        )),
        Some(error) => ProviderError::NoCapacity(joined(&error.to_string(), &passed_over)),
        None if found.may_change() => ProviderError::NoCapacity(passed_over),
        None => ProviderError::Refused(passed_over),
    }
}

fn joined(one: &str, other: &str) -> String {
    match other.is_empty() {
        true => one.to_owned(),
        false => format!("{one}; {other}"),
    }
}

/// A pod as the scaler sees it.
pub fn instance(pod: &Pod) -> Instance {
    let state = match &pod.status {
        PodStatus::Running => InstanceState::Running,
        // One that nobody knows yet may be on its way. If it is not, no worker of it connects.
        PodStatus::Provisioning | PodStatus::Starting | PodStatus::Other(_) => {
            InstanceState::Starting
        }
        ended @ (PodStatus::Exited | PodStatus::Error | PodStatus::Terminated) => {
            InstanceState::Failed(format!("RunPod says `{ended}`"))
        }
    };
    Instance {
        id: pod.id.clone(),
        pool: pod.marks.pool.clone(),
        name: pod.marks.instance.clone(),
        state,
        created_at: pod.created_at,
        price_per_hour: pod.cost,
    }
}

impl Provider for Runpod {
    fn list(&self) -> Answer<'_, Vec<Instance>> {
        Box::pin(async {
            let pods = self.pods().await?;
            Ok(pods.iter().map(instance).collect())
        })
    }

    fn create<'a>(&'a self, pool: &'a str, name: &'a str) -> Answer<'a, ()> {
        Box::pin(self.make(pool, name))
    }

    fn delete<'a>(&'a self, instance: &'a Instance) -> Answer<'a, ()> {
        Box::pin(self.end(instance))
    }
}
