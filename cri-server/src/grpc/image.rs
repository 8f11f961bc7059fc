//! Owns ImageService: each call is parsed, handed to the image store, and answered.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_image_store::{Auth, Image, PullRequest};
use tonic::{Request, Response, Status};

use super::{Served, batches, convert, present, traced};
use crate::daemon::{Daemon, blocking};
use crate::error::Error;
use crate::proto::cri;
use crate::proto::cri::image_service_server::ImageService;

/// ImageService over the daemon.
pub struct Images(pub Arc<Daemon>);

impl Images {
    fn selected(&self, filter: Option<cri::ImageFilter>) -> Vec<cri::Image> {
        let name = filter
            .and_then(|f| f.image)
            .map(|spec| spec.image)
            .unwrap_or_default();
        let images: Vec<Image> = match name.as_str() {
            "" => self.0.images.list(),
            name => self.0.images.resolve(name).into_iter().collect(),
        };
        images.iter().map(present::image).collect()
    }
}

fn info(image: &Image) -> BTreeMap<String, String> {
    let config = &image.config;
    // The shape that crictl and others know from containerd: an OCI image config.
    let info = serde_json::json!({
        "chainID": "",
        "imageSpec": {
            "created": image.created,
            "architecture": config.architecture,
            "os": config.os,
            "config": {
                "User": config.user,
                "Env": config.env,
                "Entrypoint": config.entrypoint,
                "Cmd": config.cmd,
                "WorkingDir": config.working_dir,
                "Labels": config.labels,
                "StopSignal": config.stop_signal,
            },
        },
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Served<cri::ListImagesResponse> {
        let filter = request.into_inner().filter;
        traced("ListImages", "", async {
            Ok(cri::ListImagesResponse {
                images: self.selected(filter),
            })
        })
        .await
    }

    type StreamImagesStream = super::Batches<cri::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.selected(request.into_inner().filter);
        Ok(batches(images, |images| cri::StreamImagesResponse {
            images,
        }))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Served<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let name = request.image.clone().unwrap_or_default().image;
        traced("ImageStatus", &name, async {
            let asked = convert::image_request(request.image, "image")?;
            // An unknown image is an answer without one, not an error.
            let found = self.0.images.resolve(&asked.image);
            Ok(cri::ImageStatusResponse {
                info: match (&found, request.verbose) {
                    (Some(image), true) => info(image),
                    _ => BTreeMap::new(),
                },
                image: found.as_ref().map(present::image),
            })
        })
        .await
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Served<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = request.image.clone().unwrap_or_default().image;
        traced("PullImage", &name, async {
            let asked = convert::image_request(request.image, "image")?;
            self.0.handler(&asked.runtime_handler)?;
            let pull = PullRequest {
                reference: asked.image,
                auth: request.auth.map(|auth| Auth {
                    username: auth.username,
                    password: auth.password,
                    auth: auth.auth,
                    server_address: auth.server_address,
                    identity_token: auth.identity_token,
                    registry_token: auth.registry_token,
                }),
            };
            let image = self.0.images.pull(pull).await?;
            Ok(cri::PullImageResponse {
                image_ref: image.id.to_string(),
            })
        })
        .await
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Served<cri::RemoveImageResponse> {
        let image = request.into_inner().image;
        let name = image.clone().unwrap_or_default().image;
        traced("RemoveImage", &name, async {
            let asked = convert::image_request(image, "image")?;
            let images = self.0.images.clone();
            blocking(move || images.remove(&asked.image).map_err(Error::from)).await?;
            Ok(cri::RemoveImageResponse {})
        })
        .await
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Served<cri::ImageFsInfoResponse> {
        traced("ImageFsInfo", "", async {
            let info = self.0.images.fs_info();
            let usage = cri::FilesystemUsage {
                timestamp: info.timestamp_ns,
                fs_id: Some(cri::FilesystemIdentifier {
                    mountpoint: info.mountpoint.display().to_string(),
                }),
                used_bytes: Some(cri::UInt64Value { value: info.bytes }),
                inodes_used: Some(cri::UInt64Value { value: info.inodes }),
            };
            // Writable layers live on the same file system as the images.
            Ok(cri::ImageFsInfoResponse {
                image_filesystems: vec![usage.clone()],
                container_filesystems: vec![usage],
            })
        })
        .await
    }
}
