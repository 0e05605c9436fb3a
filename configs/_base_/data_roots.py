# Where each source lies: one place for every split of it, in training, validation and test.
# On the command line: --cfg-options dataset_defaults.RefCOCODataset.data_root=/data/refer_seg
dataset_defaults = dict(
    RefCOCODataset=dict(data_root='data/refer_seg', image_dir='images/train2014'),
    GRefCOCODataset=dict(data_root='data/refer_seg', image_dir='images/train2014'),
    DescribeAnythingDataset=dict(data_root='data/describe-anything-dataset'),
    GraspAnyRegionDataset=dict(data_root='data/Grasp-Any-Region-Dataset'),
    COCORegionDataset=dict(
        ann_file='data/coco_regions/annotations.json',
        image_dir='data/coco_regions/images',
        captions='data/coco_regions/captions.csv',
    ),
    JSONLRegionDataset=dict(ann_file='data/jsonl_regions/regions.jsonl'),
    FolderRegionDataset=dict(data_root='data/folder_regions'),
    HuggingFaceRegionDataset=dict(data_root='data/hugging_face'),
    OpenImagesDataset=dict(data_root='data/openimages'),
    SA1BDataset=dict(data_root='data/sa1b'),
    Sa2VAFinetuneDataset=dict(data_root='data/sa2va_finetune'),
    SAVOfficialDataset=dict(data_root='data/sa_v/sav_train'),
    SAVPairsDataset=dict(data_root='data/sav_pairs'),
    ConversationDataset=dict(
        ann_file='data/llava/llava_v1_5_mix665k.json', image_dir='data/llava/images'
    ),
    DLCBenchDataset=dict(data_root='data/DLC-Bench'),
    RefDAVIS17Dataset=dict(data_root='data/video_datas/davis17'),
    MeViSDataset=dict(data_root='data/video_datas/mevis'),
    RefYouTubeVOSDataset=dict(data_root='data/video_datas/rvos'),
    ReVOSDataset=dict(data_root='data/video_datas/revos'),
    RefSAVDataset=dict(data_root='data/ref_sav_eval'),
)
