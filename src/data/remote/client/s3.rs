//! S3 and services with its protocol: credentials, signatures and listings, by `object_store`. Downloads use signed URLs, so
//! that resuming is the same for all servers.

use super::{choose_tls, location_shown, s3_credentials, variable};
use crate::{
    data::remote::{
        answer::{Entry, Failure},
        location::{Location, Service},
    },
    error::{Result, failed},
};
use object_store::{
    BackoffConfig, ClientOptions, Error as StoreError, ObjectStore, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
    path::Path,
    signer::Signer,
};
use reqwest::{Method, Url};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// How long a signed URL is valid: a download that begins later is signed again.
const VALID: Duration = Duration::from_secs(3600);
/// Retries of a listing or of a request for credentials, and the maximum time of one of them.
const RETRIES: usize = 5;
const TIMEOUT: Duration = Duration::from_secs(30);

/// A signed URL of an object.
///
/// # Errors
/// There are no credentials, or the key cannot be one of an object.
pub async fn signed_url(service: Service, bucket: &str, key: &str) -> Result<Url, Failure> {
    let unsigned = service == Service::S3 && variable("AWS_SKIP_SIGNATURE").is_some_and(|value| value == "true");
    let hint = s3_credentials(service);
    let store = store(service, bucket, unsigned).map_err(|e| Failure::permanent(reason(&e), hint))?;
    let path = Path::parse(key).map_err(|e| Failure::permanent(e, "check the spelling of the URL"))?;
    let url = store.signed_url(Method::GET, &path, VALID).await;
    let mut url = url.map_err(|e| Failure::permanent(reason(&e), hint))?;
    if unsigned {
        url.set_query(None);
    }
    Ok(url)
}

/// Lists the objects below a folder, `levels` deep.
///
/// # Errors
/// The server cannot be reached or refuses the request.
pub async fn list(service: Service, bucket: &str, folder: &str, levels: Option<usize>) -> Result<Vec<Entry>> {
    let location = Location::S3 { service, bucket: bucket.to_owned(), key: folder.to_owned() };
    let fail = |error: StoreError| {
        failed(format_args!("{}: cannot list: {}", location_shown(&location), reason(&error)), s3_credentials(service))
    };
    let store = store(service, bucket, false).map_err(fail)?;
    let path = Path::parse(folder).map_err(|e| fail(e.into()))?;
    let mut open = vec![(path, levels.unwrap_or(usize::MAX))];
    let mut entries = Vec::new();
    while let Some((folder, levels)) = open.pop() {
        let listed = store.list_with_delimiter(Some(&folder)).await.map_err(fail)?;
        entries.extend(listed.objects.into_iter().map(|object| Entry {
            path: object.location.to_string(),
            size: object.size,
            version: object.e_tag,
        }));
        if levels > 1 {
            open.extend(listed.common_prefixes.into_iter().map(|prefix| (prefix, levels - 1)));
        }
    }
    Ok(entries)
}

/// What went wrong, without the lines of XML that servers add.
fn reason(error: &StoreError) -> String {
    let text = match error {
        StoreError::NotFound { .. } => "the server answered 404 Not Found".to_owned(),
        StoreError::PermissionDenied { .. } => "the server answered 403 Forbidden".to_owned(),
        StoreError::Unauthenticated { .. } => "the server answered 401 Unauthorized".to_owned(),
        // The innermost cause, for the outer ones show URLs.
        error => {
            let mut cause: &dyn std::error::Error = error;
            while let Some(inner) = cause.source() {
                cause = inner;
            }
            cause.to_string()
        }
    };
    let line = text.lines().next().unwrap_or_default();
    line.chars().take(300).collect()
}

/// The store of a bucket; credentials are kept with it, and renewed before they expire.
fn store(service: Service, bucket: &str, unsigned: bool) -> Result<AmazonS3, StoreError> {
    type Stores = HashMap<(Service, String, bool), AmazonS3>;
    static STORES: Mutex<Option<Stores>> = Mutex::new(None);
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    let stores = stores.get_or_insert_default();
    let key = (service, bucket.to_owned(), unsigned);
    if let Some(store) = stores.get(&key) {
        return Ok(store.clone());
    }
    choose_tls();
    let builder = match service {
        Service::S3 => s3(bucket),
        Service::Oss => oss(bucket),
    };
    // The URL of a request without signature is that of any signed one, without its query.
    let builder = if unsigned { builder.with_access_key_id("none").with_secret_access_key("none") } else { builder };
    let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: RETRIES, retry_timeout: 4 * TIMEOUT };
    let store = builder.with_bucket_name(bucket).with_retry(retry).build()?;
    stores.insert(key, store.clone());
    Ok(store)
}

fn options(endpoint: Option<&str>) -> ClientOptions {
    let plain = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
    ClientOptions::new().with_timeout(TIMEOUT).with_allow_http(plain)
}

/// `AWS_*` variables; without keys, the credentials of the machine or container.
fn s3(bucket: &str) -> AmazonS3Builder {
    let builder = AmazonS3Builder::from_env();
    let endpoint = builder
        .get_config_value(&AmazonS3ConfigKey::S3Endpoint)
        .or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
    // Buckets with dots in their names do not fit the certificates of `BUCKET.s3.REGION.amazonaws.com`.
    let virtual_hosted = endpoint.is_none() && !bucket.contains('.');
    let builder = builder.with_client_options(options(endpoint.as_deref()));
    match variable("AWS_VIRTUAL_HOSTED_STYLE_REQUEST") {
        Some(_) => builder,
        None => builder.with_virtual_hosted_style_request(virtual_hosted),
    }
}

/// `OSS_*` variables, as Alibaba's tools name them. OSS wants the bucket in the host name.
fn oss(bucket: &str) -> AmazonS3Builder {
    let region = variable("OSS_REGION");
    let of_region = || region.as_deref().map(|region| format!("https://s3.oss-{region}.aliyuncs.com"));
    let endpoint = variable("OSS_ENDPOINT").or_else(of_region).unwrap_or_default();
    let endpoint = if endpoint.contains("://") { endpoint } else { format!("https://{endpoint}") };
    let host_has_name = Url::parse(&endpoint).ok().and_then(|url| url.domain().map(|name| name != "localhost"));
    let virtual_hosted = host_has_name == Some(true);
    let with_bucket = endpoint.replacen("://", &format!("://{bucket}."), 1);
    let mut builder = AmazonS3Builder::new()
        .with_client_options(options(Some(&endpoint)))
        .with_virtual_hosted_style_request(virtual_hosted)
        .with_region(region.unwrap_or_else(|| "oss".to_owned()))
        .with_endpoint(if virtual_hosted { with_bucket } else { endpoint });
    let keys = [
        ("OSS_ACCESS_KEY_ID", AmazonS3ConfigKey::AccessKeyId),
        ("OSS_ACCESS_KEY_SECRET", AmazonS3ConfigKey::SecretAccessKey),
        ("OSS_SESSION_TOKEN", AmazonS3ConfigKey::Token),
    ];
    for (name, key) in keys {
        if let Some(value) = variable(name) {
            builder = builder.with_config(key, value);
        }
    }
    builder
}
